"""Errors: their exit codes, their words, and when a library means that memory ran out."""

import errno

import pytest

from llmopt.optimizer import errors
from llmopt.optimizer.errors import InputError, LlmoptError, MissingExtraError, Problem, RecipeError, is_out_of_memory


def test_exit_codes_are_those_of_the_documentation() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    codes = {
        kind.__name__: kind.exit_code for kind in kinds if isinstance(kind, type) and issubclass(kind, LlmoptError)
    }
    assert codes == {
        "LlmoptError": 1, "InputError": 2, "RecipeError": 2, "PassError": 3, "RejectedError": 4,
        "UnsupportedError": 5, "MissingExtraError": 5, "VerificationError": 6, "ResourceError": 7,
    }  # fmt: skip


def test_an_error_has_a_message_and_perhaps_a_hint() -> None:
    assert (str(InputError("no")), InputError("no").hint) == ("no", None)
    assert InputError("no", hint="yes").hint == "yes"
    assert MissingExtraError("onnxruntime", "cpu").hint == "pip install 'llmopt[cpu]'"


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (Problem("r.yaml", 3, "seed", "is wrong"), "r.yaml:3: seed: is wrong"),
        (Problem("r.yaml", 3, "", "is empty", "fill it"), "r.yaml:3: is empty  hint: fill it"),
    ],
)
def test_a_problem_is_one_line(problem: Problem, shown: str) -> None:
    assert str(problem) == shown


def test_a_recipes_mistakes_are_counted() -> None:
    problem = Problem("r.yaml", 1, "a", "b")
    assert str(RecipeError([problem])) == "the recipe has 1 mistake"
    assert str(RecipeError([problem, problem])) == "the recipe has 2 mistakes"


def _library_error(module: str, text: str) -> Exception:
    return type("Fail", (Exception,), {"__module__": module})(text)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (_library_error("onnxruntime.capi.onnxruntime_pybind11_state", "Failed to allocate memory for buffer"), True),
        (_library_error("onnxruntime.capi.onnxruntime_pybind11_state", "std::bad_alloc"), True),
        (_library_error("onnxruntime.capi.onnxruntime_pybind11_state", "pthread_create failed, error code: 11"), True),
        (_library_error("safetensors._safetensors_rust", "Cannot allocate memory (os error 12)"), True),
        (_library_error("onnxruntime.capi.onnxruntime_pybind11_state", "invalid graph"), False),
        (_library_error("somewhere", "out of memory"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_it_is_known_how_libraries_say_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
