"""What cannot be trained on is skipped, written down, and can be tried again."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import create_ddp_model
from detectron2.utils.events import EventStorage
from fault_runs import load_tool, run_forked, run_overrides
from small_runs import make_batch, make_detector

from detection_toolkit.engine.train_loop import DetectionTrainLoop


def weights_become_nan():
    """From the third step on the predictions of the second stage are not finite."""

    def sabotage():
        update = DetectionTrainLoop._update

        def update_and_spoil(self, *arguments):
            update(self, *arguments)
            if self.iter == 2:
                tower = self.model.decoder.stages[1].class_tower
                torch.nn.init.constant_(tower.out.bias, float("nan"))

        DetectionTrainLoop._update = update_and_spoil

    return sabotage


def test_a_run_that_diverges_is_explained_and_its_batch_replayed(tmp_path, small_data, capsys):
    overrides = run_overrides(tmp_path / "out", small_data, "train.max_skipped_steps=2")
    log = tmp_path / "console.txt"
    assert run_forked(overrides, sabotage=weights_become_nan(), log=log) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: training stopped at iteration 5, before its update")
    assert "after 2 steps in a row that were left out" in last
    folder = tmp_path / "out" / "bad_batch"
    batch = folder / "iter0000005_rank0.pth"
    assert f"tools/replay_batch.py {batch}" in last
    report = json.loads(batch.with_suffix(".json").read_text())
    assert report["non_finite_predictions"][0]["stage"] == 1

    tool = load_tool("replay_batch")
    pictures = tmp_path / "pictures"
    assert tool.main([str(batch), "--draw", str(pictures)]) == 1
    shown = capsys.readouterr().out
    assert "first module whose output is not finite: decoder.stages.1.class_tower.out" in shown
    assert "stage 1 of image 0" in shown
    assert report["images"][0]["file_name"] in shown
    assert len(list(pictures.glob("*.png"))) == 2
    # With the weights of before, the batch is as good as any.
    good = tmp_path / "out" / (tmp_path / "out" / "last_checkpoint").read_text()
    weights = torch.load(good, weights_only=True)
    bias = weights["model"]["decoder.stages.1.class_tower.out.bias"]
    weights["model"]["decoder.stages.1.class_tower.out.bias"] = torch.zeros_like(bias)
    torch.save(weights, tmp_path / "fixed.pth")
    assert tool.main([str(batch), "--weights", str(tmp_path / "fixed.pth")]) == 0
    shown = capsys.readouterr().out
    assert "all is finite with these weights" in shown
    assert "norm of the gradient" in shown


def test_replaying_something_else_is_refused(tmp_path):
    tool = load_tool("replay_batch")
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(SystemExit, match="holds no batch"):
        tool.main([str(tmp_path / "a.pth")])


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    detector = make_detector()
    tower = detector.decoder.stages[1].class_tower
    model = create_ddp_model(detector, device_ids=None, broadcast_buffers=False)
    good = tower.out.bias.detach().clone()
    results = []
    for accumulation_steps in (1, 2):
        batches = [make_batch([1, 2], seed=rank) for _ in range(6)]
        loop = DetectionTrainLoop(
            model,
            batches,
            torch.optim.SGD(model.parameters(), lr=0.01),
            device="cpu",
            accumulation_steps=accumulation_steps,
            max_skipped_steps=1,
            output_dir=folder,
        )
        for bad_rank in (1, None, 0):
            with EventStorage():
                if rank == bad_rank:
                    tower.out.bias.data.fill_(float("nan"))
                loop.run_step()
                if rank == bad_rank:
                    tower.out.bias.data.copy_(good)
            good = tower.out.bias.detach().clone()
            results.append((loop._skipped, torch.cat([p.flatten() for p in model.parameters()])))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_a_step_that_one_process_cannot_use_is_left_out_by_all(tmp_path):
    """Neither waits for the other, with accumulated gradients or without."""
    # Forked, as importing everything takes longer than the test.
    mp.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert [skipped for skipped, _ in first] == [1, 1, 2] * 2
    for (skipped, weights), (other_skipped, other_weights) in zip(first, second):
        assert skipped == other_skipped
        assert torch.equal(weights, other_weights)
        assert torch.isfinite(weights).all()
    assert not torch.equal(first[0][1], first[1][1])  # the step between was taken
    assert torch.equal(first[1][1], first[2][1])
