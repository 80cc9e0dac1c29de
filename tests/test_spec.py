"""Spec: precedence, module types, ordinals, and messages that say what is valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from sparsec.errors import SpecError
from sparsec.formats import BSR, CSR, Bitmask, Dense
from sparsec.spec import Auto, Spec

SITES = ["encoder.0.query", "encoder.0.key", "encoder.1.query", "encoder.1.query#2", "head", "<root>"]
TYPES = ["Linear", "Linear", "Linear", "Linear", "Conv2d", ""]


def test_one_value_holds_everywhere() -> None:
    for value in (CSR(), Auto(), BSR(16, 1)):
        assert Spec(value).match("anything", "Linear") == value
    assert Spec() == Spec(None) == Spec(Auto())
    assert Spec({}).match("a", "Linear") is None
    assert Spec({"_default": None}).match("a", "Linear") is None


def test_precedence_is_name_regex_type_default() -> None:
    spec = Spec(
        {
            "_default": Auto(),
            "Linear": CSR(),
            "re:.*query": Bitmask(),
            "re:encoder.*": BSR(4, 4),
            "encoder.1.query": None,
        }
    )
    assert spec.match("encoder.1.query", "Linear") is None
    assert spec.match("encoder.0.query", "Linear") == Bitmask()
    assert spec.match("encoder.0.key", "Linear") == BSR(4, 4)
    assert spec.match("head", "Linear") == CSR()
    assert spec.match("head", "Conv2d") == Auto()
    assert Spec({"head": CSR()}).match("other", "Linear") is None


def test_a_regex_matches_the_whole_name() -> None:
    assert Spec({"re:encoder": CSR()}).match("encoder.0") is None
    assert Spec({"re:encoder[.]0": CSR()}).match("encoder.0") == CSR()


def test_ordinals() -> None:
    spec = Spec({"a": CSR(), "b#2": Bitmask(), "b": None, "re:c": BSR(1, 4)})
    assert spec.match("a#2") == spec.match("a#13") == CSR()
    assert spec.match("b#2") == Bitmask() and spec.match("b") is None and spec.match("b#3") is None
    assert spec.match("c#2") == BSR(1, 4)
    assert spec.match("a#x") is None


@pytest.mark.parametrize("key", [nn.Linear, "Linear", "torch.nn.modules.linear.Linear"])
@pytest.mark.parametrize("module_type", ["Linear", "torch.nn.modules.linear.Linear"])
def test_module_types(key: Any, module_type: str) -> None:
    assert Spec({key: CSR()}).match("a", module_type) == CSR()
    assert Spec({key: CSR()}).match("a", "Conv2d") is None
    assert Spec({key: CSR()}).match("a", "") is None


def test_dotted_types_compare_in_full() -> None:
    assert Spec({"mine.Linear": CSR()}).match("a", "torch.nn.modules.linear.Linear") is None


def test_it_is_a_value() -> None:
    spec = Spec({"a": CSR(), nn.Linear: None})
    assert spec == Spec({"a": CSR(), nn.Linear: None}) and hash(spec) == hash(Spec(spec))
    assert spec != Spec({nn.Linear: None, "a": CSR()})
    assert Spec.of(spec) is spec and Spec.of(None) == Spec() and Spec.of({"a": CSR()}) == Spec({"a": CSR()})
    assert list(spec) == ["a", "torch.nn.modules.linear.Linear"] and len(spec) == 2
    with pytest.raises(AttributeError):
        spec.entries = ()  # type: ignore[misc]
    assert repr(Spec(CSR())) == "Spec(CSR(index_bits=None, block=None))"
    assert eval(repr(Spec({"a": None, "b": Dense()}))) == Spec({"a": None, "b": Dense()})


def test_pattern_names_the_key_that_decided() -> None:
    spec = Spec({"re:.*key": CSR(), "_default": None})
    assert spec.pattern("encoder.0.key") == "re:.*key"
    assert spec.pattern("head") == "_default"
    assert Spec({}).pattern("head") is None


def test_check_accepts_what_matches() -> None:
    Spec(CSR()).check([], [])
    Spec({"encoder.1.query": CSR(), "re:.*key": None, nn.Conv2d: None, "<root>": Auto(), "_default": None}).check(
        SITES, TYPES
    )
    Spec({"encoder.1.query": None}).check(["encoder.1.query#2"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.0.qery", "'encoder.0.qery' matches no site; nearest: 'encoder.0.query'"),
        ("encoder.0", r"is no site but holds some; write 're:encoder\\\\.0\[.\]\.\*'"),
        ("re:.*value", "'re:.*value' matches no site in full"),
        (nn.Embedding, "Embedding' matches no site; module types that have sites: Linear, Conv2d"),
        ("Conv3d", "module types that have sites: Linear, Conv2d"),
        ("encoder.1.query#3", "nearest: 'encoder.1.query#2'"),
    ],
)
def test_check_names_the_nearest(key: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Spec({"_default": CSR(), key: CSR()}).check(SITES, TYPES)


def test_the_pattern_that_an_error_suggests_works() -> None:
    with pytest.raises(SpecError) as caught:
        Spec({"encoder.0": CSR()}).check(SITES, TYPES)
    suggestion = eval(str(caught.value).split("write ")[1].split(" to match")[0])
    spec = Spec({suggestion: CSR()})
    spec.check(SITES, TYPES)
    assert [s for s in SITES if spec.match(s)] == ["encoder.0.query", "encoder.0.key"]


def test_check_of_a_model_without_sites() -> None:
    with pytest.raises(SpecError, match="no site that could be made sparse"):
        Spec({"a": CSR()}).check([], [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spec({"a": "csr"}), r"pattern 'a' maps to 'csr'; valid: a format such as CSR\(\)"),
        (lambda: Spec({"a": CSR}), r"maps to the class CSR; write an instance: CSR\(\)"),
        (lambda: Spec(Auto), r"this spec maps to the class Auto; write an instance: Auto\(\)"),
        (lambda: Spec("csr"), "this spec maps to 'csr'; valid"),
        (lambda: Spec(0.9), "this spec maps to 0.9"),
        (lambda: Spec({"re:(": CSR()}), r"'re:\(' is not a valid regular expression"),
        (lambda: Spec({3: CSR()}), "pattern 3 is not a site name"),
        (lambda: Spec({"": CSR()}), "pattern '' is not a site name"),
        (lambda: Spec({nn.Linear: CSR(), "torch.nn.modules.linear.Linear": None}), "appears twice"),
    ],
)
def test_bad_specs_say_what_is_valid(make: Callable[[], Spec], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
