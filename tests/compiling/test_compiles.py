"""Compilations are counted with their names, refused before the compiler starts, and kept in a folder."""

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import forbid_compiles, nest_sequences
from jaxattn.batch.bucket import Bucket
from jaxattn.compiling import CompilationForbiddenError, compile_cache, count_compiles

pytestmark = pytest.mark.smoke

X = np.arange(6, dtype=np.float32)


def new_program(name: str = "halve"):
    """A function that nobody has compiled."""

    def function(x):
        return x / 2

    function.__name__ = name
    return jax.jit(function)


def test_compilations_have_names():
    program = new_program("first")
    with count_compiles() as outer:
        program(X)
        with count_compiles() as inner:
            program(X)
            assert inner.count == 0
            program(X[:3])
            new_program("second").lower(X).compile()
    assert outer.names == ["jit(first)", "jit(first)", "jit(second)"]
    assert inner.names == outer.names[1:]
    assert outer.seconds > inner.seconds > 0
    program(X[:2])
    assert outer.count == 3


def test_compilations_of_other_threads_count():
    with count_compiles() as compiles:
        thread = threading.Thread(target=new_program("elsewhere"), args=(X,))
        thread.start()
        thread.join()
    assert compiles.names == ["jit(elsewhere)"]


def test_a_compilation_is_refused_by_name_before_it_begins():
    program, ready = new_program("forbidden"), new_program("ready")
    ready(X)
    with count_compiles() as compiles:
        with forbid_compiles():
            np.testing.assert_array_equal(ready(X), X / 2)
            with pytest.raises(CompilationForbiddenError, match=r"jit\(forbidden\) would be compiled, which"):
                program(X)
        assert compiles.count == 0
        np.testing.assert_array_equal(program(X), X / 2)  # nothing is left of the refusal
    assert compiles.names == ["jit(forbidden)"]


def test_a_refusal_ends_with_the_outermost_context():
    program = new_program()
    with forbid_compiles():
        with forbid_compiles():
            pass
        with pytest.raises(CompilationForbiddenError):
            program(X)
    program(X)


def test_a_refusal_that_is_left_by_an_error_ends():
    with pytest.raises(KeyError), forbid_compiles():
        raise KeyError
    new_program()(X)


def test_other_threads_may_go_on_compiling():
    results, refused = [], []
    with forbid_compiles():
        thread = threading.Thread(target=lambda: results.append(new_program()(X)))
        thread.start()
        thread.join()

        def in_my_context():
            with pytest.raises(CompilationForbiddenError) as error:
                new_program()(X)
            refused.append(error)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(in_my_context,))
        thread.start()
        thread.join()
    assert len(results) == len(refused) == 1


def test_operations_outside_any_jit_are_programs_too():
    x = jnp.asarray(X)
    with forbid_compiles(), pytest.raises(CompilationForbiddenError, match="would be compiled"):
        jnp.cumsum(x.reshape(3, 2), axis=1)


def test_nesting_in_host_memory_compiles_nothing():
    with forbid_compiles():
        batch = nest_sequences([[1, 2, 3]], bucket=Bucket(1013, 7), transfer=False)
    assert isinstance(batch.packed, np.ndarray)


def test_the_persistent_cache_is_counted_and_left_as_it_was(tmp_path):
    settings = [name for name in dir(jax.config) if "compilation_cache" in name or "persistent" in name]
    before = {name: getattr(jax.config, name) for name in settings}
    for hits in (0, 1):
        with compile_cache(tmp_path), count_compiles() as compiles:
            new_program("kept")(X)
        assert compiles.names == ["jit(kept)"]
        assert compiles.cache_requests == 1
        assert (compiles.cache_hits, compiles.cache_misses) == (hits, 1 - hits)
    assert any(file.name.startswith("jit_kept") for file in tmp_path.iterdir())
    assert {name: getattr(jax.config, name) for name in settings} == before


def test_a_program_that_is_only_on_disk_is_refused(tmp_path):
    with compile_cache(tmp_path):
        new_program("on_disk")(X)
        with forbid_compiles(), pytest.raises(CompilationForbiddenError, match="on_disk"):
            new_program("on_disk")(X)


def kept(folder) -> set[str]:
    """Names of the programs in a folder."""
    return {file.name.split("-")[0] for file in folder.iterdir()} if folder.is_dir() else set()


def cache_settings() -> dict:
    return {name: getattr(jax.config, name) for name in dir(jax.config) if "cache" in name}


def test_threads_with_different_folders_take_turns(tmp_path):
    """Each program is in its own thread's folder and in no other, and JAX's setting is as before."""
    before, start = cache_settings(), threading.Barrier(4)

    def compile_some(i: int) -> None:
        start.wait()
        for j in range(5):
            with compile_cache(tmp_path / str(i)):
                new_program(f"program_{i}_{j}")(X)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(compile_some, range(4)))
    for i in range(4):
        assert kept(tmp_path / str(i)) == {f"jit_program_{i}_{j}" for j in range(5)}
    assert cache_settings() == before


def test_a_thread_with_another_folder_waits_and_one_with_the_same_does_not(tmp_path):
    same, other = threading.Event(), threading.Event()

    def enter(folder, entered: threading.Event) -> None:
        with compile_cache(folder):
            entered.set()

    with ThreadPoolExecutor(2) as threads:
        with compile_cache(tmp_path / "ours"):
            threads.submit(enter, tmp_path / "ours", same)
            threads.submit(enter, tmp_path / "theirs", other)
            assert same.wait(10)
            assert not other.wait(0.1)
        assert other.wait(10)


def test_the_innermost_folder_counts_even_where_others_share_the_outer(tmp_path):
    """A thread gives up its outer folder meanwhile, so that two with crossed folders do not wait for ever."""
    before, start = cache_settings(), threading.Barrier(2)

    def nest(outer: str, inner: str) -> None:
        with compile_cache(tmp_path / outer):
            start.wait(10) if outer == "shared" else None
            with compile_cache(tmp_path / inner):
                new_program(f"in_{inner}")(X)
            new_program(f"after_{inner}")(X)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(nest, ("shared", "shared"), ("one", "two")))
        list(threads.map(nest, ("crossed_1", "crossed_2"), ("crossed_2", "crossed_1")))
    assert kept(tmp_path / "one") == {"jit_in_one"}
    assert kept(tmp_path / "two") == {"jit_in_two"}
    assert kept(tmp_path / "shared") == {"jit_after_one", "jit_after_two"}
    assert kept(tmp_path / "crossed_1") == {"jit_in_crossed_1", "jit_after_crossed_2"}
    assert kept(tmp_path / "crossed_2") == {"jit_in_crossed_2", "jit_after_crossed_1"}
    assert cache_settings() == before


def test_tasks_of_one_thread_may_leave_in_any_order(tmp_path):
    before = cache_settings()
    first, second = compile_cache(tmp_path / "first"), compile_cache(tmp_path / "second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "second")
    second.__exit__(None, None, None)
    assert cache_settings() == before
