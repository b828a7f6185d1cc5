"""Every experiment has committed results, of today's configuration, and they are what the documents show."""

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


def test_tables_are_those_of_the_results():
    text = run_all.README.read_text()
    assert run_all.rewrite(text) == text


def test_a_stale_table_is_noticed():
    text = run_all.README.read_text()
    name = run_all.NAMES[0]
    start = text.index(f"<!-- table: {name}.")
    digit = next(i for i in range(start, len(text)) if text[i].isdigit())
    stale = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    assert run_all.rewrite(stale) == text


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="has no table 'x'"):
        run_all.rewrite(f"<!-- table: {run_all.NAMES[0]}.x -->\n<!-- end of table -->")


@pytest.mark.parametrize("name", run_all.NAMES)
def test_every_experiment_is_shown(name):
    text, log = run_all.README.read_text(), (run_all.FOLDER / "LOG.md").read_text()
    assert f"\n| `{name}.py` | " in text
    assert f"\n## `{name}.py`\n" in text
    assert f"(results/{name}.png)" in text
    assert f", `{name}.py`\n" in log
    for table in run_all.experiment(name).tables(read_result(RESULTS / f"{name}.jsonl").rows):
        assert f"<!-- table: {name}.{table} -->" in text
