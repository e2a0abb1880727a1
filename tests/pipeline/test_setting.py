"""A law has one name, which is read back to the same law."""

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.setting import Names, Setting

NAMES = [
    "T=0",
    "T=0.7",
    "T=0.7,top_k=50,top_p=0.9",
    "T=1,top_p=0.95",
    "T=1,drafts=greedy",
    "T=1",
    "T=1.25,top_k=2,drafts=greedy",
]


def test_a_name_reads_back_to_its_setting() -> None:
    for name in NAMES:
        assert Setting.parse(name).name == name
    whole = Setting.parse("T=0.7,top_k=50,top_p=0.9,drafts=greedy")
    assert whole == Setting(0.7, 50, 0.9, "greedy")
    assert whole.law == "T=0.7,top_k=50,top_p=0.9"
    assert whole.served == Setting(0.7, 50, 0.9)
    assert whole.words == "T = 0.7, top-k 50, top-p 0.9, greedy drafts"


def test_settings_rise_with_the_temperature_and_what_is_left() -> None:
    order = sorted((Setting.parse(name) for name in NAMES), key=lambda s: s.order)
    assert [s.name for s in order] == [
        "T=0",
        "T=0.7,top_k=50,top_p=0.9",
        "T=0.7",
        "T=1,top_p=0.95",
        "T=1,drafts=greedy",
        "T=1",
        "T=1.25,top_k=2,drafts=greedy",
    ]
    assert [s.name for s in order if s.plain] == ["T=0", "T=0.7", "T=1"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "0.7",
        "T=",
        "T=-1",
        "T=nan",
        "T=inf",
        "top_p=0.9",
        "top_p=0.9,T=1",
        "T=1,T=1",
        "T=1,top_k=1",
        "T=1,top_k=2.5",
        "T=1,top_p=1",
        "T=1,top_p=0",
        "T=0,top_p=0.9",
        "T=0,drafts=greedy",
        "T=1,drafts=sampled",
        "T=1,min_p=0.1",
        "T=1, top_p=0.9",
    ],
)
def test_what_is_no_name_or_a_second_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="T=<temperature>, then top_k=<at least 2>, top_p=<betw"):
        Setting.parse(name)


def test_a_list_of_names_holds_each_law_once() -> None:
    names = TypeAdapter(Names)
    assert names.validate_python(["T=1.0", "T=0.70,top_p=.9"]) == ["T=1", "T=0.7,top_p=0.9"]
    with pytest.raises(ValidationError, match="each law once"):
        names.validate_python(["T=1", "T=1.0"])
