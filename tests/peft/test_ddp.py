"""Two processes on halves of a batch train as one process on all of it, and no injected parameter is left unused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_d2.storage import adapter_file

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
import peft_d2
from peft_d2 import peft

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 24)
        self.mlp = nn.Linear(24, 24)
        self.box = nn.ModuleList([self.mlp, self.mlp])
    def forward(self, x):
        y = self.linear(x + self.self_attn(x, x, x)[0])
        return self.box[1](y + self.mlp(y))

def shard(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0])
    return fully_shard(model)

rank, out, rendezvous, sharded = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "sharded"
torch.manual_seed(0)
model = nn.Sequential(Layer(), nn.LayerNorm(24), nn.Linear(24, 3)).double()
peft.inject(model, [
    {"NAME": "lora", "TARGETS": ["self_attn"], "PARTS": ["q", "k", "v", "out"], "RANK": 2},
    {"NAME": "lora", "TARGETS": ["linear"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True},
    {"NAME": "lora", "TARGETS": ["mlp"], "DORA": True, "RANK": 2},
    {"NAME": "adapter", "TARGETS": ["self_attn", "mlp"], "NUM": 2},
], ["2"])
peft.add_adapter(model, "other")
images, labels = torch.randn(8, 5, 8).double(), torch.randn(8, 5, 3).double()
run = model
if rank >= 0:
    dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=2)
    images, labels = images[4 * rank : 4 * rank + 4], labels[4 * rank : 4 * rank + 4]
    run = shard(model) if sharded else nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD([t.param for t in peft.trained_parameters(run)], lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    (run(images) - labels).square().mean().backward()
    optimizer.step()
if sharded:
    refused = (peft.merge, peft.remove, lambda m: peft.set_adapter(m, "other"), lambda m: peft.add_adapter(m, "third"),
               lambda m: peft_d2.load_adapter(m, "nowhere"), lambda m: peft.prove_live(m, images))
    for call in refused:
        try:
            call(run)
        except peft.InjectionError as error:
            assert "spread over processes (FSDP)" in str(error) and "save_adapter puts them together" in str(error)
        else:
            raise AssertionError(call)
    peft_d2.save_adapter(run, out + ".folder")
state = peft.adapter_state_dict(run)
if rank <= 0:
    torch.save(state, out)
if rank >= 0:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("way", ["ddp", "sharded"])
def test_two_processes_are_one(way: str, tmp_path: Path) -> None:
    if way == "sharded":
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        if not hasattr(fsdp, "fully_shard"):
            pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    alone, joined = tmp_path / "alone.pt", tmp_path / "joined.pt"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(out), str(tmp_path / "meet"), used], cwd=Path.cwd()
        )
        for rank, out, used in ((-1, alone, ""), (0, joined, way), (1, joined, way))
    ]
    assert [run.wait(timeout=240) for run in runs] == [0, 0, 0]
    expected, found = torch.load(alone), torch.load(joined)
    assert expected.keys() == found.keys() and len(expected) > 20
    if way == "sharded":
        (saved,) = tmp_path.glob("*.folder")
        found = dict(adapter_file.read(saved).tensors)
        assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
