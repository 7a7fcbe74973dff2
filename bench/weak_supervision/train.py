"""One training: network, losses, schedule, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from gcrf_triton import gated_crf_loss, partial_cross_entropy

from .data import (
    VOC_CLASSES,
    Augmentation,
    Batches,
    Collection,
    Labeller,
    Pictures,
    Slices,
    TrainingSet,
    check,
    read_list,
    reduce,
    save_labels,
    weak_labeller,
)
from .networks import build_network
from .scores import Scores
from .settings import Settings

PICTURES_KEPT = 6  # predictions saved for a panel


@dataclass
class Data:
    """What a training reads."""

    collection: Collection
    labeller: Labeller
    training: list[str]
    testing: list[str]


@dataclass
class Result:
    """What a training leaves behind besides its files."""

    scores: dict[str, float]
    curve: list[dict[str, float]]  # step, pce, gcrf and the scores
    seconds_per_step: float  # median
    loss_share: float  # of the Gated CRF loss, forward and backward, in a step
    kernel_mass: float  # mean sum of a pixel's kernel, over the last batch


def open_collection(settings: Settings) -> Collection:
    """The images and masks that the settings name."""
    if not settings.root:
        raise ValueError("root: expected the folder of the data, got none")
    root = Path(settings.root)
    if settings.data == "acdc":
        return Slices(root)
    class_names = VOC_CLASSES if settings.class_names == "voc" else read_list(root / settings.class_names)
    return Pictures(root, settings.images, settings.masks, class_names, settings.train_list, settings.test_list)


def open_data(settings: Settings, made_labels: Path, on_broken: str = "stop") -> Data:
    """Lists, weak labels (made from dense masks where there are none) and a look at every file.

    Raises:
        ValueError: naming every broken file, one a line, where `on_broken` is "stop"; "skip" leaves them out.
    """
    collection = open_collection(settings)
    training, testing = collection.lists["train"], collection.lists["test"]
    apart = collection.held_out(training, settings.held_out)
    if settings.evaluate_on == "held-out":
        testing = [name for name in training if name in apart]
        training = [name for name in training if name not in apart]
    sources = [Path(source) for source in settings.labels_from.split(",") if source]
    human = isinstance(collection, Slices) and settings.labels == "scribbles"
    if settings.labels != "dense" and not sources and not human:
        sources = [made_labels / f"{settings.data}-{settings.labels}-{settings.label_seed}"]
        if settings.labels == "clicks":
            sources[0] = sources[0].with_suffix(".json")
        if not sources[0].exists():
            save_labels(collection, collection.lists["train"], settings.labels, settings.label_seed, sources[0])
    labeller = weak_labeller(
        collection, settings.labels, sources, settings.thickness, settings.keep, settings.label_seed
    )
    broken = check(collection, labeller, training)
    broken |= check(collection, lambda name, height, width: collection.read_mask(name), testing)
    if broken and on_broken == "stop":
        count = f"{len(broken)} broken of {len(training) + len(testing)} images"
        raise ValueError("\n".join([*broken.values(), count]))
    for message in broken.values():
        tqdm.write(f"left out: {message}")
    training, testing = ([name for name in names if name not in broken] for names in (training, testing))
    if not training or not testing:
        raise ValueError(f"{settings.root}: expected images to train and test on, got {len(training)}, {len(testing)}")
    return Data(collection, labeller, training, testing)


def train(settings: Settings, data: Data, out: Path, stop_after: int | None = None) -> Result | None:
    """Train, resuming from `out/checkpoint.pt` where there is one; write predictions of a few images.

    `stop_after` ends at that step, as if killed, and returns None. Under `torchrun`, every process takes its part of
    each batch.
    """
    rank, processes = world()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    parts = settings.accumulate * processes
    if settings.batch % parts:
        raise ValueError(f"batch: expected a multiple of {parts}, for processes and accumulation, got {settings.batch}")
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    network = build_network(settings.network, len(data.collection.class_names)).to(device)
    parallel = DistributedDataParallel(network) if processes > 1 else network
    optimizer = make_optimizer(settings, network)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, settings.steps, settings.power)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
    kept = {"network": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    curve: list[dict[str, float]] = []
    first = 0
    if (out / "checkpoint.pt").exists():
        first, curve = load_checkpoint(out / "checkpoint.pt", settings, kept, rank, device)
    torch.manual_seed(settings.seed + 7919 * rank) if not first else None

    augmentation = Augmentation((settings.crop, settings.crop), (settings.smallest, settings.largest))
    samples = TrainingSet(
        data.collection,
        data.labeller,
        data.training,
        settings.side,
        augmentation,
        settings.seed,
        thin=settings.labels != "dense",
    )
    batches = Batches(len(samples), settings.batch, range(first, settings.steps), settings.seed, rank, processes)
    bar = tqdm(
        DataLoader(samples, batch_sampler=batches),
        initial=first,
        total=settings.steps,
        desc=out.name,
        unit="step",
        disable=True if rank else None,
        mininterval=2,
    )
    seconds, recent = [], []
    with log_to(out, rank) as log:
        for step, batch in enumerate(bar, start=first + 1):
            start = time.perf_counter()
            image, labels, validity = (tensor.to(device) for tensor in batch)
            weight = settings.weight * ramp(step / settings.steps, settings)
            losses = []
            network.train()
            for part in zip(*(tensor.chunk(settings.accumulate) for tensor in (image, labels, validity)), strict=True):
                partial, gated, logits = losses_of(parallel, *part, weight, settings)
                scaler.scale((partial + weight * gated) / settings.accumulate).backward()
                losses.append((partial.item(), gated.item()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            seconds.append(time.perf_counter() - start)
            recent.append(np.mean(losses, axis=0))
            log(step, pce=recent[-1][0], gcrf=recent[-1][1], weight=weight)
            bar.set_postfix(pce=f"{recent[-1][0]:.3f}", gcrf=f"{recent[-1][1]:.3f}", refresh=False)
            if step % max(settings.steps // settings.evaluations, 1) == 0 or step == settings.steps:
                pce, gcrf = np.mean(recent, axis=0)
                recent = []
                if rank == 0:
                    scores = evaluate(network, data, settings, device).summary()
                    curve.append({"step": step, "pce": round(float(pce), 5), "gcrf": round(float(gcrf), 5)} | scores)
                    log(step, **scores)
            if settings.checkpoint_every and step % settings.checkpoint_every == 0 and step < settings.steps:
                save_checkpoint(out / "checkpoint.pt", settings, kept, step, curve, rank, processes)
            if step == stop_after:
                return None
    if rank:
        return None
    evaluate(network, data, settings, device, save_to=out / "predictions", most=PICTURES_KEPT)
    image, labels, validity = (tensor.to(device) for tensor in batch)
    alone, mass = time_loss(logits.detach(), *part, settings)
    step_seconds = statistics.median(seconds)
    return Result(curve[-1], curve, step_seconds, alone * settings.accumulate / step_seconds, mass)


def losses_of(
    network: nn.Module, image: Tensor, labels: Tensor, validity: Tensor, weight: float, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial cross entropy at the labels' resolution, Gated CRF loss (0 without weight), logits [N, C, h, w]."""
    dtype = torch.float32 if settings.amp == "none" else getattr(torch, settings.amp)
    with torch.autocast(image.device.type, dtype, enabled=settings.amp != "none"):
        logits = network(image.expand(-1, 3, -1, -1))
    logits = logits.float()
    enlarged = logits
    if logits.shape[2:] != labels.shape[1:]:
        enlarged = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    partial = partial_cross_entropy(enlarged, labels)
    if settings.loss == "pce" or weight == 0:
        return partial, torch.zeros_like(partial), logits
    return partial, crf(logits, image, labels, validity, settings), logits


def crf(logits: Tensor, image: Tensor, labels: Tensor, validity: Tensor, settings: Settings) -> Tensor:
    """The Gated CRF loss of logits [N, C, h, w] on the grid, and with the gates, of the settings."""
    logits = to_grid(logits, settings.loss_stride, image.shape[2:])
    arguments = crf_arguments(image, labels, validity, logits.shape[2:], settings)
    loss = gated_crf_loss(logits, from_logits=True, **arguments)
    return loss / kernel_mass(arguments, logits.shape[2:]) if settings.normalise == "mass" else loss


def to_grid(logits: Tensor, loss_stride: str, full: Sequence[int]) -> Tensor:
    """Logits on the network's own grid ("native"), that of the image [H, W] ("full") or one of a stride."""
    if loss_stride == "native":
        return logits
    stride = 1 if loss_stride == "full" else int(loss_stride)
    height, width = (-(-length // stride) for length in full)
    if height <= logits.shape[2]:
        return F.adaptive_avg_pool2d(logits, (height, width))
    return F.interpolate(logits, (height, width), mode="bilinear")


def crf_arguments(
    image: Tensor, labels: Tensor, validity: Tensor, grid: Sequence[int], settings: Settings
) -> dict[str, object]:
    """Features, kernels and gates [N, h, w]; a cell is valid if all of it is, and labelled if any of it is."""
    sigmas = {"rgb": settings.sigma, "xy": settings.xy}
    try:
        kernels = [
            {"weight": 1.0} | {name: sigmas[name] for name in kernel.split("+")}
            for kernel in settings.kernels.split(",")
        ]
    except KeyError as error:
        raise ValueError(f"kernels: expected rgb and xy, joined by + and commas, got {settings.kernels!r}") from error
    valid = ~shrink_any(~validity, grid)
    source = destination = None
    if settings.gates in ("source", "both"):
        source = valid
    if settings.gates in ("destination", "both"):
        destination = valid & ~shrink_any(labels != 255, grid)
    return {
        "features": {"rgb": image},
        "kernels": kernels,
        "radius": settings.radius,
        "source": source,
        "destination": destination,
    }


def shrink_any(marked: Tensor, grid: Sequence[int]) -> Tensor:
    """[N, H, W] bool to a coarser grid: whether any pixel of a cell is marked."""
    return F.adaptive_max_pool2d(marked[:, None].float(), tuple(grid))[:, 0] > 0


@torch.no_grad()
def kernel_mass(arguments: dict, grid: Sequence[int]) -> Tensor:
    """Mean over the pixels that count of their kernel's sum: the loss where no two predictions agree."""
    image = arguments["features"]["rgb"]
    disagreeing = image.new_zeros(len(image), 1, *grid)
    return gated_crf_loss(disagreeing, **arguments).clamp(min=1e-6)


def ramp(progress: float, settings: Settings) -> float:
    """The share of the loss's weight after this share of the steps: 0 until the delay, then rising to 1."""
    since = progress - settings.delay
    if settings.loss == "pce" or since <= 0:
        return 0.0
    return min(since / settings.ramp, 1.0) if settings.ramp else 1.0


@torch.no_grad()
def evaluate(
    network: nn.Module,
    data: Data,
    settings: Settings,
    device: torch.device,
    save_to: Path | None = None,
    most: int | None = None,
) -> Scores:
    """Score the test images at their own resolution; `save_to` keeps predictions, of `most` images spread over all."""
    network.eval()
    scores = Scores(data.collection.class_names)
    names = data.testing if most is None else data.testing[:: max(len(data.testing) // most, 1)][:most]
    for name in names:
        full, truth = data.collection.read_image(name), data.collection.read_mask(name)
        image, _ = reduce(full, torch.from_numpy(truth), settings.side, thin=False)
        logits = network(image[None].expand(-1, 3, -1, -1).to(device))
        prediction = F.interpolate(logits.float(), truth.shape, mode="bilinear")[0].argmax(0).byte().cpu().numpy()
        scores.add(data.collection.group(name), truth, prediction)
        if save_to is not None:
            save_to.mkdir(parents=True, exist_ok=True)
            Image.fromarray(prediction).save(save_to / f"{Path(name.split()[0]).stem}.png")
    return scores


def time_loss(
    logits: Tensor, image: Tensor, labels: Tensor, validity: Tensor, settings: Settings
) -> tuple[float, float]:
    """Median seconds of the Gated CRF loss alone, forward and backward, and its kernel's mass; zeros without it."""
    if settings.loss == "pce":
        return 0.0, 0.0
    seconds = []
    for _ in range(7):
        logits.requires_grad_().grad = None
        start = time.perf_counter()
        crf(logits, image, labels, validity, settings).backward()
        seconds.append(time.perf_counter() - start)
    grid = to_grid(logits, settings.loss_stride, image.shape[2:]).shape[2:]
    return statistics.median(seconds), kernel_mass(crf_arguments(image, labels, validity, grid, settings), grid).item()


def make_optimizer(settings: Settings, network: nn.Module) -> torch.optim.Optimizer:
    """Adam, or stochastic gradient descent with momentum."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(network.parameters(), rate, weight_decay=decay)


def world() -> tuple[int, int]:
    """Rank and number of processes; joins the group that `torchrun` announces."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", 0)), processes


def save_checkpoint(
    path: Path, settings: Settings, kept: dict, step: int, curve: list, rank: int, processes: int
) -> None:
    """Everything the next step depends on, written whole or not at all; order and augmentation follow from the step."""
    random = [torch.get_rng_state()]
    if torch.cuda.is_available():
        random.append(torch.cuda.get_rng_state())
    everyone = [random]
    if processes > 1:
        everyone = [None] * processes
        distributed.all_gather_object(everyone, random)
    if rank:
        return
    state = {name: part.state_dict() for name, part in kept.items()}
    state |= {"settings": dataclasses.asdict(settings), "step": step, "curve": curve, "random": everyone}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(
    path: Path, settings: Settings, kept: dict, rank: int, device: torch.device
) -> tuple[int, list[dict[str, float]]]:
    """Put everything back; the steps done and the curve so far."""
    state = torch.load(path, map_location=device, weights_only=True)
    wanted = dataclasses.asdict(settings)
    changed = [name for name, value in wanted.items() if state["settings"].get(name) != value]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path}: expected {name}={wanted[name]!r}, got a checkpoint of {state['settings'].get(name)!r}"
        )
    for name, part in kept.items():
        part.load_state_dict(state[name])
    random = state["random"][rank]
    torch.set_rng_state(random[0].cpu())
    if len(random) > 1:
        torch.cuda.set_rng_state(random[1].cpu())
    return state["step"], state["curve"]


@contextlib.contextmanager
def log_to(folder: Path, rank: int) -> Iterator:
    """A function that logs numbers of a step for TensorBoard, and does nothing where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    if SummaryWriter is None or rank:
        yield lambda step, **values: None
        return
    with SummaryWriter(str(folder)) as writer:

        def log(step: int, **values: float) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log
