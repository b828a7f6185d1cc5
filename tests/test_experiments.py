"""Every experiment has committed results, of today's configuration, and they are what the documents show."""

import dataclasses

import pytest
import run_all
from experiment import RESULTS, config_as_json, read_result


@pytest.mark.parametrize("name", run_all.NAMES)
def test_committed_results(name):
    experiment = run_all.experiment(name)
    result = read_result(RESULTS / f"{name}.jsonl")
    assert result.config == config_as_json(experiment.committed)
    assert result.rows
    assert result.provenance["commit"]
    assert (RESULTS / f"{name}.png").exists()
    assert run_all.shape_of(experiment.plot(result.rows))


@pytest.mark.parametrize("name", run_all.NAMES)
def test_configurations_are_frozen(name):
    experiment = run_all.experiment(name)
    for config in (experiment.committed, experiment.small):
        assert dataclasses.is_dataclass(config)
        hash(config)  # frozen, all the way down


def test_tables_are_those_of_the_results():
    text = run_all.README.read_text()
    assert run_all.rewrite(text) == text


def test_every_table_is_shown():
    text = run_all.README.read_text()
    for name in run_all.NAMES:
        for table in run_all.experiment(name).tables(read_result(RESULTS / f"{name}.jsonl").rows):
            assert f"<!-- table: {name}.{table} -->" in text
