"""Seconds of a fixed matrix product on the GPU, printed; for the control of a benchmark."""

import statistics

import torch

SIZE, REPEATS = 4096, 30


def main() -> None:
    first, second = (torch.ones(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * REPEATS)]
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        torch.mm(first, second)
        end.record()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1000 for start, end in zip(events[::2], events[1::2], strict=True)]
    print(statistics.median(seconds[REPEATS // 3 :]))


if __name__ == "__main__":
    main()
