"""The benchmark of the attention layer."""

from benchmarks import deformable_attention

from detection_toolkit.studies.steps import StepCost


def test_both_forms_are_measured(monkeypatch):
    monkeypatch.setattr(deformable_attention, "SIZE", (96, 160))
    for form in deformable_attention.FORMS["cpu"]:
        forward, step = deformable_attention.costs(form, 1).values()
        assert 0 < forward.memory < step.memory


def test_the_table_has_seconds_and_ratios(monkeypatch, capsys):
    measured = {
        "grid": {"forward": StepCost(3.0, 80.0), "and backward": StepCost(9.0, 200.0)},
        "gather": {"forward": StepCost(2.0, 60.0), "and backward": StepCost(4.0, 50.0)},
    }
    monkeypatch.setattr(deformable_attention, "costs", lambda form, rounds, **_: measured[form])
    deformable_attention.main([])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["forward", "grid", "3000.0", "1.00", "1.00"],
        ["forward", "gather", "2000.0", "1.50", "0.75"],
        ["and", "backward", "grid", "9000.0", "1.00", "1.00"],
        ["and", "backward", "gather", "4000.0", "2.25", "0.25"],
    ]
