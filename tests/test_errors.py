"""Errors cross process boundaries whole, and several of them have one exit code."""

import pickle

import pytest

from slimport.errors import SlimportError, worst


def every_error() -> list[type[SlimportError]]:
    return [SlimportError, *SlimportError.__subclasses__()]


def test_every_error_has_an_exit_code_of_its_own() -> None:
    codes = [error.exit_code for error in every_error()]
    assert sorted(codes) == list(range(1, 9))


@pytest.mark.parametrize("error", every_error())
def test_an_error_survives_pickling(error: type[SlimportError]) -> None:
    again = pickle.loads(pickle.dumps(error("what", "why", "cure")))
    assert type(again) is error
    assert (again.what, again.why, again.cure) == ("what", "why", "cure")
    assert str(again) == "what\nwhy\ncure"


@pytest.mark.parametrize(
    ("codes", "code"), [([], 0), ([3, 4], 4), ([5, 4, 3], 5), ([3, 7, 8], 7), ([8, 2], 8)]
)
def test_the_worst_of_several(codes: list[int], code: int) -> None:
    assert worst(codes) == code
