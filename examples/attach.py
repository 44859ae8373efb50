"""A plain torchrun DDP script that gained two lines: `ddp.attach` and `meter.step`.

torchrun --nproc-per-node 2 examples/attach.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddp

STEPS, BATCH_SIZE, INPUTS = 300, 32, 20


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    truth = torch.randn(INPUTS, 1)
    model = DistributedDataParallel(nn.Linear(INPUTS, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    meter = ddp.attach(model, batch_size=BATCH_SIZE, optimizer=optimizer)  # line one

    data = torch.Generator().manual_seed(1 + rank)  # each rank draws its own examples
    for step in range(1, STEPS + 1):
        inputs = torch.randn(BATCH_SIZE, INPUTS, generator=data)
        targets = inputs @ truth + 2 * torch.randn(BATCH_SIZE, 1, generator=data)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        reading = meter.step(examples=len(inputs))  # line two
        if rank == 0 and step % 50 == 0:
            print(
                f"step {step}: loss {loss.item():.3f}, noise scale {reading.noise_scale:.0f} "
                f"[{reading.low:.0f}, {reading.high:.0f}] examples ({reading.state})"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
