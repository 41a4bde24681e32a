"""Training as the toolkit does it: several processes, accumulation, mixed precision, resuming."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from deformable_detr_models import VARIANTS, make_model, small_run
from detectron2.engine import create_ddp_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from small_runs import make_batch
from two_processes import run_two_processes

from detection_toolkit.engine import Trainer
from detection_toolkit.engine.train_loop import DetectionTrainLoop

CROSS_STAGE = [
    "model.criterion.label_assigner={_target_:stageinteractor.CrossStageMatcher}",
    "model.criterion.normalizer={_target_:detection_toolkit.training.LabelNormalizer}",
]
RECOLLECTION = [
    "model.decoder.route={_target_:sqr.QueryRecollection,"
    "schedule:{_target_:sqr.selective_schedule,num_stages:2}}"
]
KINDS = {
    "plain": ("plain", []),
    "two_stage": ("two_stage", []),
    "recollection": ("plain", RECOLLECTION),
    "refine_recollection": ("refine", RECOLLECTION),
    "two_stage_recollection": ("two_stage", RECOLLECTION),
    "cross_stage": ("refine", CROSS_STAGE),
}


def make(kind):
    variant, overrides = KINDS[kind]
    return make_model(variant, *overrides).double().train()


@pytest.mark.parametrize("counts", [(2, 1), (0, 0), (7, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_counted_without_predictions_where_the_objects_decide(
    kind, counts, monkeypatch
):
    detector, batch = make(kind), make_batch(counts)
    images = detector.preprocess_image(batch)
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    expected = detector.criterion.count_targets(detector.predict(images), truth)
    calls = []
    predict = detector.predict
    monkeypatch.setattr(detector, "predict", lambda *args: calls.append(1) or predict(*args))
    torch.testing.assert_close(detector.count_targets(batch), expected, rtol=0, atol=0)
    # Seven objects are more than the six queries, but not more than the proposals.
    needed = kind == "cross_stage" or (kind.startswith("two_stage") and 7 in counts)
    assert len(calls) == needed


def one_step(model, batches, folder, **options):
    """Losses of a step that changes no weight, as its gradients are to be compared."""
    loop = DetectionTrainLoop(
        model,
        batches,
        torch.optim.SGD(model.parameters(), lr=0.0),
        device="cpu",
        accumulation_steps=len(batches),
        output_dir=str(folder),
        **options,
    )
    with EventStorage() as storage:
        loop.run_step()
    gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {k: v[0] for k, v in storage.latest().items() if "loss" in k}, gradients


def assert_same_step(step, expected):
    for values, reference in zip(step, expected):
        assert values.keys() == reference.keys()
        for name, value in reference.items():
            if value is None:
                assert values[name] is None
            else:
                torch.testing.assert_close(
                    values[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_are_one(kind, tmp_path):
    images = make_batch([3, 0, 1, 2])
    expected = one_step(make(kind), [images], tmp_path)
    assert_same_step(one_step(make(kind), [images[:2], images[2:]], tmp_path), expected)


def run_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for kind in KINDS:
        model = create_ddp_model(
            make(kind), device_ids=None, broadcast_buffers=False, find_unused_parameters=False
        )
        images = make_batch([3, 0, 1, 2])[2 * rank : 2 * rank + 2]
        results[kind] = one_step(model, [images[:1], images[1:]], folder)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_that_accumulate_are_one(tmp_path):
    run_two_processes(run_process, tmp_path)
    (first, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind in KINDS:
        losses, gradients = one_step(make(kind), [make_batch([3, 0, 1, 2])], tmp_path)
        # The first process writes the means; gradients are the same in both.
        assert_same_step(first[kind], (losses, gradients))
        assert_same_step((second[kind][1],), (gradients,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision_keeps_coordinates_and_losses(variant, tmp_path):
    batch = make_batch([2, 1])
    exact, exact_gradients = one_step(make_model(variant).train(), [batch], tmp_path)
    losses, gradients = one_step(
        make_model(variant).train(), [batch], tmp_path, precision="bfloat16"
    )
    assert losses.keys() == exact.keys()
    # bfloat16 keeps 8 bits; a match may change where two costs are close.
    assert losses["total_loss"] == pytest.approx(exact["total_loss"], rel=0.1)
    for name, gradient in gradients.items():
        if exact_gradients[name] is not None:
            assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
    detector = make_model(variant).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        stages = detector.predict(detector.preprocess_image(batch)).stages
    assert all(x.boxes.dtype == x.queries.geometry.dtype == torch.float32 for x in stages)


@pytest.mark.parametrize("variant", ["plain", "two_stage"])
def test_a_run_in_two_parts_equals_a_run_in_one(variant, tmp_path):
    def run(folder, *, stop=4, resume=False):
        config = small_run(
            folder,
            variant,
            "model.encoder.dropout=0.1",
            "model.decoder.dropout=0.1",
            "train.accumulation_steps=2",
            num_images=7,
        )
        trainer = Trainer(config)
        trainer.resume_or_load(resume=resume)
        trainer.max_iter = stop
        trainer.train()
        return trainer

    seed_all_rng(7)
    whole = run(tmp_path / "whole")
    seed_all_rng(7)
    run(tmp_path / "parts", stop=2)
    seed_all_rng(8)
    resumed = run(tmp_path / "parts", resume=True)
    assert (resumed.start_iter, resumed.iter) == (2, 4)
    states = [t.checkpointer.model.state_dict() for t in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    moments = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    for key, state in moments[0].items():
        assert all(torch.equal(moments[1][key][name], value) for name, value in state.items())
