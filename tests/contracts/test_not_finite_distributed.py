"""An evaluation by several processes, of which one meets predictions that are not finite."""

import torch
import torch.distributed as dist
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from two_processes import run_two_processes

from detection_toolkit.errors import NonFinitePredictionError
from detection_toolkit.evaluation import run_evaluator


class Diverged(torch.nn.Module):
    """Raises in one of the processes, in a batch after the first."""

    def __init__(self, *, raises):
        super().__init__()
        self.raises = raises
        self.batches = 0

    def forward(self, batch):
        self.batches += 1
        if self.raises and self.batches > 1:
            raise NonFinitePredictionError([(3, 0)], images=["a.png"])
        return batch


class Gathers(DatasetEvaluator):
    """Asks for all processes, as those of Detectron2 do."""

    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)

    def evaluate(self):
        comm.synchronize()
        return {"bbox": {"images": sum(comm.gather(self.images))}}


def evaluate(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sound = Diverged(raises=False)
    results = [run_evaluator(sound, [[0], [1, 2]], Gathers())]
    model = Diverged(raises=rank == 1).train()
    try:
        run_evaluator(model, [[0], [1], [2]], Gathers())
    except NonFinitePredictionError as error:
        results.append((str(error), model.training))
    comm.synchronize()  # nobody is left waiting, and nobody is one step ahead
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_hear_of_it_and_none_waits_for_another(tmp_path):
    run_two_processes(evaluate, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first[0] == {"bbox": {"images": 6}}
    assert "images of another process" in first[1][0]
    assert "stage 3 of image a.png" in second[1][0]
    assert first[1][1] and second[1][1]  # both go on in training mode
