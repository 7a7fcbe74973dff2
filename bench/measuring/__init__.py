"""What the commands measure with: cases, what is compared, time and memory, rows, pictures, the machine."""
