from __future__ import annotations

import gc
import weakref

import pytest

from fxjacobi.settled_heap import settled_heap


class Ring:
    def __init__(self) -> None:
        self.ring = self


def test_what_was_there_is_not_walked_and_what_is_made_inside_is_collected() -> None:
    before = weakref.ref(Ring())
    frozen = gc.get_freeze_count()  # Python 3.12 has some of its own frozen
    with settled_heap():
        assert gc.get_freeze_count() > frozen
        inside = weakref.ref(Ring())
        gc.collect()
        assert inside() is None
        assert before() is not None
    gc.collect()
    assert before() is None
    assert gc.get_freeze_count() <= frozen


def test_it_ends_with_an_exception_and_nests() -> None:
    frozen = gc.get_freeze_count()

    def fails() -> None:
        with settled_heap():
            with settled_heap():
                pass
            assert gc.get_freeze_count() > frozen
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert gc.get_freeze_count() <= frozen


def test_a_heap_that_the_program_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with settled_heap():
            pass
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()
