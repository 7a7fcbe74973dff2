"""One training: network, optimiser, schedule, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..measuring.progress import bar, write_line
from .collection import stem
from .data import Data
from .labels import UNLABELLED
from .losses import as_input, losses_of, ramp, time_loss, weights_of_classes
from .networks import build_network
from .samples import Batches, TrainingSet, shorten
from .scores import Scores
from .settings import Settings

PICTURES_KEPT = 6  # predictions saved for a panel
CHECKPOINT = "checkpoint.pt"
NETWORK = "network.pt"  # what was trained, a state_dict
WITHOUT_EFFECT = ("workers", "checkpoint_every")  # on the numbers that a training ends in
WAIT = datetime.timedelta(days=1)


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)  # step, pce, gcrf and the scores
    recent: list[tuple[float, float]] = field(default_factory=list)  # pce and gcrf since the curve's last point
    seconds: list[float] = field(default_factory=list)  # of every step, without reading


@dataclass
class Result:
    """What a training leaves behind besides its files."""

    scores: dict[str, float]
    curve: list[dict[str, float]]
    seconds_per_step: float  # median of the steps after the delay of the loss
    loss_share: float  # of the Gated CRF loss, forward and backward, in a step
    kernel_mass: float  # mean sum of a pixel's kernel, over the last batch


class Trainer:
    """Everything that changes while training, and is put back from a checkpoint."""

    def __init__(self, settings: Settings, pixels: Sequence[int]) -> None:
        """`pixels`: labelled in training, of each class [C]."""
        self.settings = settings
        self.rank, self.processes = world()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        parts = settings.accumulate * self.processes
        if settings.batch % parts:
            raise ValueError(f"batch: expected a multiple of {parts} (processes, parts), got {settings.batch}")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(settings.seed)  # the same weights in every process
        network = build_network(settings.network, len(pixels))
        self.network = network.to(self.device, memory_format=torch.channels_last)  # a fifth to a third faster
        self.class_weights = weights_of_classes(pixels, settings.class_weights).to(self.device)
        self.parallel = DistributedDataParallel(self.network) if self.processes > 1 else self.network
        self.optimizer = make_optimizer(settings, self.network)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, settings.steps, settings.power)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "float16")
        self.progress = Progress()
        torch.manual_seed(settings.seed + 7919 * self.rank)  # other noise in each

    def step(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """One step of the optimiser on images [N, F, H, W], labels and validity [N, H, W].

        However many parts and processes share the batch, its labelled pixels weigh the same, but for their classes; the
        Gated CRF loss is the mean over the parts. Returns the last part of the batch with its logits, to time the loss.
        """
        start = time.perf_counter()
        settings, progress = self.settings, self.progress
        progress.step += 1
        weight = settings.weight * ramp(progress.step / settings.steps, settings)
        self.network.train()
        sums = [0.0, 0.0]
        parts = list(zip(*(tensor.to(self.device).chunk(settings.accumulate) for tensor in batch), strict=True))
        for share, part in zip(self.shares([labels for _, labels, _ in parts]), parts, strict=True):
            partial, gated, logits = losses_of(self.parallel, *part, self.class_weights, weight, settings)
            partial = share * partial
            self.scaler.scale((partial + weight * gated) / settings.accumulate).backward()
            sums = [sums[0] + partial.item(), sums[1] + gated.item()]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        progress.recent.append((sums[0] / settings.accumulate, sums[1] / settings.accumulate))
        progress.seconds.append(time.perf_counter() - start)
        return [logits.detach(), *part]

    def shares(self, parts: list[Tensor]) -> Tensor:
        """What the labelled pixels of each part weigh, over the mean of all parts of all processes."""
        weights = F.pad(self.class_weights, (0, UNLABELLED + 1 - len(self.class_weights)))
        labelled = torch.stack([weights[labels.long()].sum() for labels in parts])
        mean = labelled.mean()
        if self.processes > 1:
            distributed.all_reduce(mean)
            mean /= self.processes
        return labelled / mean.where(mean > 0, 1.0)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all. Order and augmentation of samples follow from the step."""
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random.append(torch.cuda.get_rng_state())
        everyone = [random]
        if self.processes > 1:
            everyone = [[]] * self.processes
            distributed.all_gather_object(everyone, random)
        if self.rank:
            return
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"settings": asdict(self.settings), "progress": asdict(self.progress), "random": everyone}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Put everything back. Raises ValueError for a checkpoint of other settings."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, wanted in asdict(self.settings).items():
            if name not in WITHOUT_EFFECT and (found := state["settings"].get(name)) != wanted:
                raise ValueError(f"{path}: expected {name}={wanted!r}, got a checkpoint of {name}={found!r}")
        if (found := len(state["random"])) != self.processes:
            raise ValueError(f"{path}: expected {self.processes} processes, got a checkpoint of {found}")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.progress = Progress(**state["progress"])
        random = state["random"][self.rank]
        torch.set_rng_state(random[0].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random[1].cpu())

    def _parts(self) -> dict[str, object]:
        return {
            "network": self.network,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }


def train(settings: Settings, data: Data, out: Path) -> Result | None:
    """Train, from `out/checkpoint.pt` on where there is one; keep predictions of a few images.

    Under `torchrun` every process takes its part of each batch, and all but the first return None.
    """
    trainer = Trainer(settings, data.pixels)
    if (out / CHECKPOINT).exists():
        trainer.load(out / CHECKPOINT)
    progress, rank = trainer.progress, trainer.rank
    samples = TrainingSet(data, settings)
    steps = range(progress.step, settings.steps)
    batches = Batches(len(samples), settings.batch, steps, settings.seed, rank, trainer.processes)
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=settings.workers,
        generator=torch.Generator(),  # its own: starting to read must not move the network's noise
    )
    with (
        log_to(out, rank, progress.step) as log,
        bar(loader, out.name, settings.steps, "step", progress.step, hidden=rank > 0) as shown,
    ):
        for batch in shown:
            last = trainer.step(batch)
            pce, gcrf = progress.recent[-1]
            shown.set_postfix(pce=f"{pce:.3f}", gcrf=f"{gcrf:.3f}", refresh=False)
            log(progress.step, pce=pce, gcrf=gcrf)
            ended = progress.step == settings.steps
            if progress.step * settings.evaluations % settings.steps < settings.evaluations:  # the last step is one
                if rank == 0:
                    scores = evaluate(trainer.network, data, settings).summary()
                    log(progress.step, **scores)
                    pce = statistics.fmean(pce for pce, _ in progress.recent)
                    gcrf = statistics.fmean([gcrf for _, gcrf in progress.recent if gcrf] or [0.0])  # once it started
                    progress.curve.append({"step": progress.step, "pce": pce, "gcrf": gcrf} | scores)
                    if shown.disable:
                        found = ", ".join(f"{name} {scores[name]:.3f}" for name in ("dice", "miou"))
                        write_line(f"{out.name}: {progress.step} of {settings.steps} steps, {found}")
                progress.recent.clear()
            if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0 and not ended:
                trainer.save(out / CHECKPOINT)
    if rank:
        return None
    torch.save(trainer.network.state_dict(), out / NETWORK)
    shown = data.testing[:: max(len(data.testing) // PICTURES_KEPT, 1)][:PICTURES_KEPT]
    for name, logits in predict(trainer.network, data, settings, shown):
        (out / "predictions").mkdir(exist_ok=True)
        Image.fromarray(logits.argmax(0).astype(np.uint8)).save(out / "predictions" / f"{stem(name)}.png")
    alone, mass = time_loss(*last, settings)
    seconds = statistics.median(progress.seconds[int(settings.delay * settings.steps) :] or progress.seconds)
    return Result(progress.curve[-1], progress.curve, seconds, alone * settings.accumulate / seconds, mass)


def evaluate(network: nn.Module, data: Data, settings: Settings) -> Scores:
    """Score the test images at their own resolution."""
    scores = Scores(data.collection.class_names)
    for name, logits in predict(network, data, settings, data.testing):
        scores.add(data.collection.group(name), data.collection.read_mask(name), logits)
    return scores


@torch.no_grad()
def predict(network: nn.Module, data: Data, settings: Settings, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and logits [C, H, W] at the image's own resolution."""
    network.eval()
    device = next(network.parameters()).device
    for name in names:
        image = data.collection.read_image(name)
        height, width = image.shape[1:]
        smaller, _ = shorten(image, torch.zeros(height, width, dtype=torch.uint8), settings.side, thin=False)
        logits = network(as_input(smaller[None].to(device))).float()
        yield name, F.interpolate(logits, (height, width), mode="bilinear")[0].cpu().numpy()


def make_optimizer(settings: Settings, network: nn.Module) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, or stochastic gradient descent with momentum."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(network.parameters(), rate, weight_decay=decay)


def world() -> tuple[int, int]:
    """Rank and number of processes; joins the group that `torchrun` announces."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before NCCL picks one
    if processes > 1 and not distributed.is_initialized():
        # the others wait while the first makes labels, checks and scores
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    return int(os.environ.get("RANK", 0)), processes


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """What the first process writes, the others find."""
    rank, processes = world()
    if rank:
        distributed.barrier()
    yield
    if processes > 1 and not rank:
        distributed.barrier()


@contextlib.contextmanager
def log_to(folder: Path, rank: int, step: int) -> Iterator[Callable[..., None]]:
    """A function that logs numbers of a step for TensorBoard, and does nothing where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    if SummaryWriter is None or rank:
        yield lambda step, **values: None
        return
    with SummaryWriter(str(folder), purge_step=step + 1) as writer:

        def log(step: int, **values: float) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log
