"""DistributedDataParallel with two real processes: every replica ends with one student and one teacher."""

from __future__ import annotations

import crcore_torch as crt
import torch
from small_nets import assert_same_bits, mlp, recipe, snapshot, train_step, vectors
from torch import nn

import crcore as cr


def replica(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        net = mlp()
        net.insert(1, nn.BatchNorm1d(8))
        student = crt.prepare(net, recipe(3, overrides={"5": {"activations": cr.MinMax(4)}}))
        wrapped = nn.parallel.DistributedDataParallel(student)
        teacher = crt.Teacher(wrapped, cr.EMA(0.5))
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
        teacher.follow(optimizer)
        copying = crt.Teacher(wrapped, cr.EMA(0.5, batchnorm="copy"))
        copying.follow(optimizer)
        first = None
        for step in range(3):
            x, y = vectors(seed=10 * step + rank)
            x = (1 + 9 * rank) * x + rank  # the replicas' data differ in size and, after ReLU, in what is negative
            train_step(wrapped, teacher, optimizer, (x.abs() if rank == 0 else x, y))
            first = snapshot(student) if first is None else first
        networks = {"student": student, "teacher": teacher, "copying": copying}
        states = {name: snapshot(network) for name, network in networks.items()}
        torch.save(states | {"first": first}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_every_replica_ends_with_the_same_scales_and_the_same_teacher(tmp_path):
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["student"]["0.input_quantizer.signed"] == 1  # only rank 1 met negative inputs
    for each in ("first", "student"):  # whose BatchNorm statistics DistributedDataParallel leaves to each replica
        assert one[each]["1.running_mean"].ne(two[each]["1.running_mean"]).any()
        assert_same_bits(*[{k: v for k, v in run[each].items() if "running" not in k} for run in (one, two)])
    assert_same_bits(one["teacher"], two["teacher"])
    assert_same_bits(one["copying"], two["copying"])
    mean = (one["student"]["1.running_mean"] + two["student"]["1.running_mean"]) / 2
    torch.testing.assert_close(one["copying"]["model.1.running_mean"], mean)
    assert not one["teacher"]["model.5.input_quantizer.high"].equal(one["first"]["5.input_quantizer.high"])
    assert one["teacher"]["step"] == 3
    assert not one["teacher"]["model.0.weight"].equal(one["student"]["0.weight"])
