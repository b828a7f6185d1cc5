"""The command line, as a user calls it."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_tokenizers

from jaxattn import DecoderConfig, Model, Sampling, compute_logits, generate, load_tokenizer, save_params
from jaxattn.attention.choice_table import read_table
from jaxattn.cli.choices import VARIABLE
from jaxattn.cli.main import run
from jaxattn.measuring import tune
from jaxattn.measuring.timing import Measured
from jaxattn.models import init_params

CONFIG = DecoderConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_windows=(None, 5),
)
PROMPTS = [[1, 5, 9], [7], [2] * 11]
PROMPT_OPTIONS = [word for prompt in PROMPTS for word in ("--prompt-ids", " ".join(map(str, prompt)))]


@pytest.fixture(scope="module")
def model() -> Model:
    params = init_params(jax.random.key(0), CONFIG)
    return Model.from_params(CONFIG, jax.tree.map(lambda x: 1.5 * x, params))


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("cli") / "checkpoint"
    save_params(path, model.params, model.config)
    tiny_tokenizers.byte_level().save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return str(path)


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["auto", "reference", "xla", "triton"])
def test_generate(model, path, capsys, implementation):
    options = ["--max-new-tokens", "6", "--json", "--implementation", implementation]
    assert run(["generate", path, *PROMPT_OPTIONS, *options]) == 0
    assert json.loads(capsys.readouterr().out) == {"tokens": generate(model, PROMPTS, 6)}


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_quantised_cache(model, path, capsys, monkeypatch, dtype):
    compiled = []

    def generate_and_look(model, *args, **kwargs):
        compiled.append(set(model.compiled.programs))
        tokens = generate(model, *args, **kwargs)
        compiled.append(set(model.compiled.programs))
        return tokens

    monkeypatch.setattr("jaxattn.cli.generate.generate", generate_and_look)
    options = ["--max-new-tokens", "6", "--json", "--cache-dtype", dtype]
    assert run(["generate", path, *PROMPT_OPTIONS, *options]) == 0
    expected = generate(model, PROMPTS, 6, cache_dtype=dtype)
    assert json.loads(capsys.readouterr().out) == {"tokens": expected}
    assert compiled[0] == compiled[1], "all programs were compiled while the weights were read"


def test_generate_prints_a_line_per_prompt(model, path, capsys):
    assert run(["generate", path, *PROMPT_OPTIONS, "--max-new-tokens", "2"]) == 0
    expected = [f"{i}: {a} {b}" for i, (a, b) in enumerate(generate(model, PROMPTS, 2))]
    assert capsys.readouterr().out.splitlines() == expected


def test_sampling_options(path, capsys):
    def draw(seed):
        options = ["--max-new-tokens", "9", "--temperature", "2", "--top-k", "30", "--seed", seed, "--json"]
        assert run(["generate", path, *PROMPT_OPTIONS, *options]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    assert draw("0") != draw("1")


TEXTS = ["once upon", "a"]


@pytest.fixture
def warm(model, monkeypatch):
    """A checkpoint that is loaded as the model, whose programs are kept from test to test."""

    def load(options, *buckets):
        for bucket in buckets:
            bucket(model.compiled)
        return model

    monkeypatch.setattr("jaxattn.cli.generate.load", load)


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def continued(model, tokenizer) -> list[list[int]]:
    return generate(model, [tokenizer.encode(text) for text in TEXTS], 8)


def test_text(continued, tokenizer, path, capsys):
    arguments = ["generate", path, "--prompt", TEXTS[0], "--prompt", TEXTS[1], "--max-new-tokens", "8"]
    texts = [tokenizer.decode(new) for new in continued]
    assert run(arguments) == 0
    assert capsys.readouterr().out == "".join(f"{i}: {text}\n" for i, text in enumerate(texts))
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tokens": continued, "texts": texts}


def test_text_ends_where_the_checkpoint_says(warm, tokenizer, path, monkeypatch):
    stops = []

    def look(*args, stop_token_ids, **kwargs):
        stops.extend(stop_token_ids)
        return generate(*args, stop_token_ids=stop_token_ids, **kwargs)

    monkeypatch.setattr("jaxattn.cli.generate.generate", look)
    arguments = ["generate", path, "--prompt", TEXTS[0], "--prompt-ids", "7", "--max-new-tokens", "8"]
    assert run(arguments) == 0
    assert stops == [(1, 2), ()]
    assert run([*arguments, "--stop-token-id", "5", "--stop-token-id", "9"]) == 0
    assert stops[2:] == [(5, 9)] * 2


def test_stop_tokens(warm, continued, path, capsys):
    stops = [continued[0][3], continued[1][2]]
    expected = [new[: min(new.index(stop) for stop in stops if stop in new) + 1] for new in continued]
    arguments = ["--prompt", TEXTS[0], "--prompt", TEXTS[1], "--max-new-tokens", "8", "--json"]
    options = [word for stop in stops for word in ("--stop-token-id", str(stop))]
    assert run(["generate", path, *arguments, *options]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected


def test_tokens_as_they_come(warm, continued, tokenizer, path, capsys):
    arguments = ["generate", path, "--max-new-tokens", "8", "--stream"]
    both = [*arguments, "--prompt", TEXTS[0], "--prompt", TEXTS[1]]
    assert run([*both, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 4, "the first token at once, and the others later"
    for i, new in enumerate(continued):
        mine = [line for line in lines if line["prompt"] == i]
        assert [token for line in mine for token in line["tokens"]] == new
        assert "".join(line["text"] for line in mine) == tokenizer.decode(new)
    assert run(both) == 0
    printed = capsys.readouterr().out
    assert printed == "".join(f"{line['prompt']}: {line['text']}\n" for line in lines if line["text"])
    assert run([*arguments, "--prompt", TEXTS[0]]) == 0
    assert capsys.readouterr().out == tokenizer.decode(continued[0]) + "\n"
    assert run([*arguments, "--prompt-ids", " ".join(map(str, tokenizer.encode(TEXTS[0])))]) == 0
    assert capsys.readouterr().out.split() == list(map(str, continued[0]))


def test_more_prompts_than_the_cache_holds(warm, model, path, capsys, monkeypatch):
    """The limit is handed on, and no program of one batch is compiled."""
    arguments = ["--max-new-tokens", "6", "--page-size", "4", "--num-pages", "5", "--json"]
    compiled = set(model.compiled.programs)
    served = []

    def serve(*args, num_pages, page_size, **options):
        served.append((num_pages, page_size))
        return [[1], [2], [3]]

    monkeypatch.setattr(sys.modules["jaxattn.serving.generate"], "serve", serve)
    assert run(["generate", path, *PROMPT_OPTIONS, *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {"tokens": [[1], [2], [3]]}
    assert served == [(5, 4)]
    assert set(model.compiled.programs) == compiled


def test_prompts_of_a_file(warm, model, tokenizer, path, tmp_path, capsys):
    """Prompts keep the order in which they were given, and a line's options stand before the command's."""
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt_ids": PROMPTS[0], "max_new_tokens": 3},
        {"prompt": TEXTS[0], "temperature": 1.0, "top_k": 9, "top_p": 0.9, "seed": 5},
        {"prompt": TEXTS[0], "stop_token_ids": []},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    prompts = ["--prompt-ids", "7", "--prompts-file", str(file), "--prompt", TEXTS[1]]
    options = ["--max-new-tokens", "8", "--temperature", "2", "--seed", "40", "--json"]
    assert run(["generate", path, *prompts, *options]) == 0
    text = tokenizer.encode(TEXTS[0])
    expected = generate(
        model,
        [[7], PROMPTS[0], text, text, tokenizer.encode(TEXTS[1])],
        [8, 3, 8, 8, 8],
        sampling=[
            Sampling(temperature=2.0, seed=40),
            Sampling(temperature=2.0, seed=41),
            Sampling(temperature=1.0, top_k=9, top_p=0.9, seed=5),
            Sampling(temperature=2.0, seed=43),
            Sampling(temperature=2.0, seed=44),
        ],
        stop_token_ids=[[], [], [1, 2], [], [1, 2]],
    )
    assert json.loads(capsys.readouterr().out)["tokens"] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "file:2: not JSON: "),
        ('["once"]', """file:2: ["once"] is no object; write {"prompt": "text"}"""),
        ('{"prompt": "a", "top": 1}', "file:2: unknown key 'top'; use prompt, prompt_ids, max_new_tokens, "),
        ('{"prompt": "a", "prompt_ids": [1]}', "file:2: give one of prompt and prompt_ids"),
        ('{"seed": 3}', "file:2: give one of prompt and prompt_ids"),
        ('{"prompt": 3}', "file:2: prompt=3 must be a string"),
        ('{"prompt_ids": "1 2"}', "file:2: prompt_ids='1 2' must be a list of token ids"),
        ('{"prompt_ids": [1.5]}', "file:2: prompt_ids=[1.5] must be a list of token ids"),
        ('{"prompt": "a", "stop_token_ids": 3}', "file:2: stop_token_ids=3 must be a list of token ids"),
        ('{"prompt": "a", "max_new_tokens": "3"}', "file:2: max_new_tokens='3' must be an integer"),
        ('{"prompt": "a", "max_new_tokens": 0}', "file:2: max_new_tokens=0 must be an integer of at least"),
        ('{"prompt": "a", "top_p": 1.5}', "file:2: top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_lines_that_are_refused(path, tmp_path, capsys, line, message):
    (tmp_path / "file").write_text(f'{{"prompt": "a"}}\n{line}\n')
    options = ["--max-new-tokens", "2", "--prompts-file", str(tmp_path / "file")]
    assert run(["generate", path, *options]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_continue(path, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("\n")
    for given, message in (
        ([], "there is no prompt; give --prompt, --prompt-ids or --prompts-file"),
        (["--prompts-file", str(file)], f"--prompts-file {file} holds no prompt; give one JSON object per"),
        (["--prompts-file", str(tmp_path)], f"--prompts-file {tmp_path} cannot be read: "),
    ):
        assert run(["generate", path, "--max-new-tokens", "2", *given]) == 2
        assert message in capsys.readouterr().err


def test_text_without_a_tokenizer(model, path, tmp_path, capsys, monkeypatch):
    arguments = ["--prompt", "once", "--max-new-tokens", "2"]
    assert run(["generate", str(tmp_path), *arguments]) == 2
    assert f"no tokenizer.json beside the weights at {tmp_path}; looked for" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run(["generate", path, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        'jaxattn: error: text needs the package tokenizers; install it with: pip install "j'
    )


def test_dtype(model, path, tmp_path):
    out = tmp_path / "logits.npz"
    assert run(["logits", path, *PROMPT_OPTIONS, "--dtype", "bfloat16", "--out", str(out)]) == 0
    low = jax.tree.map(lambda x: x.astype("bfloat16"), model.params)
    with np.load(out) as arrays:
        expected = compute_logits(Model.from_params(CONFIG, low), PROMPTS)
        np.testing.assert_array_equal(arrays["logits_2"], expected[2])


def test_checks_and_kept_programs(path, tmp_path):
    out, kept = tmp_path / "logits.npz", tmp_path / "compiled"
    options = ["--check-finite", "--verify", "--compile-cache", str(kept), "--out", str(out)]
    assert run(["logits", path, *PROMPT_OPTIONS, *options]) == 0
    assert any(file.name.startswith("jit_score") for file in kept.iterdir())


@pytest.mark.smoke
def test_logits(model, path, tmp_path):
    out = tmp_path / "logits.file"  # written under this very name
    assert run(["logits", path, *PROMPT_OPTIONS, "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert list(arrays) == ["logits_0", "logits_1", "logits_2"]
        for i, expected in enumerate(compute_logits(model, PROMPTS)):
            assert arrays[f"logits_{i}"].dtype == np.float32
            np.testing.assert_allclose(arrays[f"logits_{i}"], expected, rtol=0, atol=1e-5)


@pytest.mark.smoke
def test_info(capsys, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert run(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for phase in ("decode", "prefill"):
        assert facts[phase]["implementation"] == "xla"
        assert "jaxattn/choices.json runs[" in facts[phase]["reason"]
    assert facts[VARIABLE] == "not set"
    assert [table.partition(",")[0] for table in facts["tables"]] == ["jaxattn/choices.json"]
    assert run(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["jax", jax.__version__] for line in lines)
    assert any(line.startswith("decode          xla: xla is ") for line in lines)


def test_tune_and_follow_it(tmp_path, capsys, monkeypatch):
    """As a new user does: measure, set the variable, look."""
    out = tmp_path / "my choices.json"
    layer = ["--head-dim", "128", "--heads", "2/1", "--dtype", "bfloat16", "--page-size", "16"]
    options = ["--quick", *layer, "--out", str(out)]
    assert run(["tune", *options]) == 0
    printed = capsys.readouterr().out
    assert f"wrote 2 rows to {out}" in printed
    assert f"export {VARIABLE}='{out}'" in printed
    assert "not what is fastest" in printed
    monkeypatch.setenv(VARIABLE, str(out))
    assert run(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts[VARIABLE] == str(out)
    assert facts["tables"][0] == f"{out}, 2 rows"
    for i, phase in enumerate(("decode", "prefill")):
        assert facts[phase]["reason"].endswith(f"{out} runs[0].rows[{i}]")
    before = out.read_text()
    assert run(["tune", *options]) == 2
    assert f"--out {out} exists; name another file, or replace it with --force" in capsys.readouterr().err
    assert out.read_text() == before


def test_tune_replaces_a_file_if_forced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *args, repeats: Measured(1.0, (1.0,), "host"))
    out = tmp_path / "choices.json"
    out.write_text("{}")
    options = ["--quick", "--page-size", "none", "--head-dim", "16", "--implementation", "xla"]
    assert run(["tune", *options, "--out", str(out), "--force"]) == 0
    assert len(read_table(out).facts) == 1
    assert (
        run(["tune", "--page-size", "none", "--implementation", "mosaic", "--out", str(tmp_path / "b")]) == 2
    )
    output = capsys.readouterr()
    assert "no row for prefill in float32, head dim 64, packed keys: mosaic: dtype float32" in output.out
    assert output.err.splitlines()[-1].startswith("jaxattn: error: no candidate serves any of these layers")
    assert not (tmp_path / "b").exists()


def test_tune_a_quantised_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *args, repeats: Measured(1.0, (1.0,), "host"))
    out = tmp_path / "choices.json"
    options = ["--quick", "--page-size", "16", "--head-dim", "16", "--implementation", "xla"]
    assert run(["tune", *options, "--cache-dtype", "int8", "--out", str(out)]) == 0
    assert [row.kv_dtype for row in read_table(out).facts] == 2 * [("float32",)] + 2 * [("int8",)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache-dtype", "float16"], "invalid choice: 'float16'"),
        (["--heads", "32"], "'32' must be query heads/key heads, such as 32/8"),
        (["--page-size", "0"], "'0' must be an integer of at least 1, or 'none'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_tune_usage(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        run(["tune", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "6/4"], "num_q_heads=6 must be a multiple of num_kv_heads=4"),
        (["--head-dim", "0"], "head_dim=0 must be an integer"),
        (["--out", "."], "--out . is a folder; name a file in it"),
        (["--out", "none/x"], "the folder none does not exist; create it"),
    ],
)
def test_tune_checks_before_it_measures(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "measure", None)
    assert run(["tune", *options]) == 2
    assert message in capsys.readouterr().err


def test_info_says_what_is_wrong_with_a_table(tmp_path, capsys, monkeypatch):
    path = tmp_path / "choices.json"
    path.write_text('{"jaxattn_choices": 1, "runs": 3}')
    monkeypatch.setenv(VARIABLE, str(path))
    assert run(["info"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxattn: error: {VARIABLE}={path}: {path}: runs=3 is not a list; correct it")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-ids", "1 x"], "--prompt-ids '1 x' (prompt 0) must be integers"),
        (["--prompt-ids", " "], "(prompt 0) is empty"),
        (
            ["--prompt-ids", "1", "--prompt-ids", "300"],
            "sequences[1][0]=300 is a token id outside the vocabulary",
        ),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], "max_new_tokens=0 must be an integer"),
        (["--prompt-ids", "1", "--dtype", "int8"], "int8"),
        (["--prompt-ids", "1", "--page-size", "0"], "page_size=0"),
    ],
)
def test_an_error_is_one_line_and_status_2(path, capsys, arguments, message):
    assert run(["generate", path, "--max-new-tokens", "2", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("jaxattn: error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_missing_checkpoint(tmp_path, capsys):
    assert run(["generate", str(tmp_path / "none"), "--prompt-ids", "1", "--max-new-tokens", "2"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_output_folder_is_checked_before_anything_is_loaded(tmp_path, capsys):
    out = tmp_path / "none" / "logits.npz"
    assert run(["logits", str(tmp_path), "--prompt-ids", "1", "--out", str(out)]) == 2
    assert "does not exist; create it" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="none"):
        run(["generate", str(tmp_path / "none"), "--prompt-ids", "1", "--max-new-tokens", "2", "--debug"])


def test_wrong_usage_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        run(["generate", "somewhere"])
    error = capsys.readouterr().err
    assert "required" in error
    assert error.count("\n") == 1


def test_a_dtype_that_no_cache_has(capsys):
    with pytest.raises(SystemExit, match="2"):
        run(["generate", "somewhere", "--prompt-ids", "1", "--max-new-tokens", "1", "--cache-dtype", "int4"])
    assert "--cache-dtype: invalid choice: 'int4'" in capsys.readouterr().err


def test_debug_before_the_command(tmp_path):
    with pytest.raises(ValueError, match="none"):
        run(["--debug", "logits", str(tmp_path / "none"), "--prompt-ids", "1", "--out", str(tmp_path / "x")])


def test_output_that_is_a_folder(tmp_path, capsys):
    assert run(["logits", "nowhere", "--prompt-ids", "1", "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_as_a_program(path):
    command = [
        sys.executable,
        "-m",
        "jaxattn",
        "generate",
        path,
        "--prompt-ids",
        "1",
        "--max-new-tokens",
        "0",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("jaxattn: error: max_new_tokens=0")
