"""Search spaces: those that come with dsm-tune, what they draw, and what a file must not say."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsm_tune.errors import SpaceError
from dsm_tune.plan import Geometry
from dsm_tune.searching.budget import Cost, Limits, fit
from dsm_tune.searching.space import (
    FORMAT,
    RULES,
    Choices,
    Range,
    Space,
    build,
    load_space,
    parse_space,
    space_names,
)

GEOMETRIES = {
    "deit_tiny": Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token"),
    "shallow": Geometry((4, 4), 1, 4, 32, 2, 64, 4, 10, "token"),
    "one_block": Geometry((4, 6), 2, 1, 32, 2, 64, 4, 10, "distilled"),
    "no_class_token": Geometry((8, 8), 0, 6, 32, 2, 64, 4, 10, "avg"),
    "registers_but_average": Geometry((8, 8), 4, 6, 32, 2, 64, 4, 10, "avg"),
    "map_head": Geometry((5, 5), 0, 8, 32, 2, 64, 4, 10, "map"),
    "dinov2": Geometry((16, 16), 5, 24, 64, 4, 256, 14, 0, "token"),
    "huge_depth": Geometry((7, 7), 1, 32, 32, 2, 64, 14, 10, "token"),
}


class Dice:
    """Draws as ``optuna.Trial`` does, and keeps what was asked."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked: set[str] = set()

    def suggest_float(self, name: str, low: float, high: float) -> float:
        assert low < high
        return self._note(name, self.random.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        assert type(low) is type(high) is int
        assert low < high
        return self._note(name, self.random.randint(low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        assert len(choices) > 1
        return self._note(name, self.random.choice(choices))

    def _note(self, name: str, value: Any) -> Any:
        assert name not in self.asked
        self.asked.add(name)
        return value


def parsed(text: str, *, head: str = f'format = "{FORMAT}"\n') -> Space:
    return parse_space((head + text).encode(), "mine", "mine.toml")


# -- the spaces that come with dsm-tune -------------------------------------------------------


def test_three_spaces_come_with_dsm_tune() -> None:
    assert {"default", "paper", "wide"} <= set(space_names())


def test_the_spaces_lie_beside_the_package_in_a_checkout() -> None:
    beside = Path(__file__).resolve().parents[2] / "search_spaces"
    assert sorted(file.stem for file in beside.glob("*.toml")) == space_names()


@pytest.mark.parametrize("name", space_names())
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@given(seed=st.integers(0, 1 << 32), delay=st.integers(0, 31))
def test_whatever_a_space_draws_for_a_model_is_a_plan_of_that_model(
    name: str, geometry: Geometry, seed: int, delay: int
) -> None:
    delay %= geometry.depth
    bound = load_space(name).bind(geometry, delay)
    params = bound.draw(Dice(seed))
    shape = build(params, geometry, delay)
    plan = shape.plan(geometry, geometry.patches // 2, "label")
    assert plan.model == "label"
    assert len(shape.shares) == len(shape.kinds) == len(shape.windows) == geometry.depth
    assert min(shape.shares) >= 0
    assert all(shape.shares[block] == 0 for block in range(max(delay + params["offset"], 0)))


@pytest.mark.parametrize("name", space_names())
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_every_enqueued_point_can_be_built_for_every_model(name: str, geometry: Geometry) -> None:
    for delay in range(geometry.depth):
        bound = load_space(name).bind(geometry, delay)
        for point in bound.enqueued:
            params = bound.complete(point)
            assert set(params) == set(bound.parameters)
            assert all(kind.admits(params[key]) for key, kind in bound.parameters.items())
            build(params, geometry, delay).plan(geometry, 3)


@given(st.sampled_from(space_names()), st.integers(0, 1 << 32))
def test_stored_parameters_build_the_same_shape_without_a_sampler(name: str, seed: int) -> None:
    geometry = GEOMETRIES["deit_tiny"]
    bound = load_space(name).bind(geometry, 2)
    params = bound.draw(Dice(seed))
    stored = json.loads(json.dumps(params))
    assert build(stored, geometry, 2) == build(params, geometry, 2)
    assert bound.complete(stored) == params


def test_what_has_one_value_is_not_drawn() -> None:
    bound = parsed("").bind(GEOMETRIES["deit_tiny"], 2)
    dice = Dice(0)
    assert bound.draw(dice) == bound.complete({})
    assert dice.asked == set()
    assert bound.size == 1


def test_an_empty_space_is_the_papers_plan() -> None:
    from dsm_tune import schedules

    geometry = GEOMETRIES["deit_tiny"]
    shape = build(parsed("").complete({}), geometry, 2)
    assert shape.plan(geometry, 160).digest == schedules.dsm(geometry, 16, delay=2).digest


def test_jitter_gives_each_block_a_parameter_of_its_own() -> None:
    bound = parsed("[reduction]\njitter = 0.5").bind(GEOMETRIES["deit_tiny"], 2)
    assert [bound.parameters[f"jitter_{block}"] for block in range(12)] == [Range(-0.5, 0.5)] * 12
    assert bound.size == float("inf")
    params = bound.draw(Dice(0))
    shares = build(params, GEOMETRIES["deit_tiny"], 2).shares
    assert len(set(shares[2:])) == 10


def test_a_positive_bump_removes_most_in_the_middle_and_a_slope_at_one_end() -> None:
    geometry, space = GEOMETRIES["deit_tiny"], parsed("[reduction]\nbump=[0,2]\nslope=[-1,1]")
    hump = build(space.complete({"bump": 1.0}), geometry, 2).shares[2:]
    assert hump.index(max(hump)) in (4, 5)
    assert hump == pytest.approx(hump[::-1])
    rising = build(space.complete({"slope": 1.0}), geometry, 2).shares[2:]
    assert list(rising) == sorted(rising)


def test_a_prefix_only_last_block_and_pruning_take_the_last_reducing_blocks() -> None:
    geometry = GEOMETRIES["deit_tiny"]
    space = parsed('[reduction]\nprune_blocks=[0,4]\nlast_block=["all","prefix"]')
    shape = build(space.complete({"prune_blocks": 2, "last_block": "prefix"}), geometry, 2)
    assert shape.shares[11] == 0
    assert shape.kinds[9:11] == ("prune", "prune")
    assert shape.kinds[:9] == ("merge",) * 9


@given(every=st.integers(1, 12), drops=st.integers(0, 12), offset=st.integers(-2, 9))
def test_every_nth_block_reduces_from_the_first_on_and_the_last_of_these_prune(
    every: int, drops: int, offset: int
) -> None:
    geometry = GEOMETRIES["deit_tiny"]
    space = parsed("[delay]\noffset=[-2,9]\n[reduction]\nevery=[1,12]\nprune_blocks=[0,12]")
    point = {"every": every, "prune_blocks": drops, "offset": offset}
    shape = build(space.complete(point), geometry, 2)
    reducing = list(range(2 + offset, 12, every))
    assert [block for block in range(12) if shape.shares[block]] == reducing
    pruning = [block for block in reducing if shape.kinds[block] == "prune"]
    assert pruning == reducing[len(reducing) - min(drops, len(reducing)) :]


def test_a_study_from_before_steps_had_gaps_reduces_in_every_block() -> None:
    geometry = GEOMETRIES["deit_tiny"]
    params = parsed("").complete({})
    del params["every"]
    assert build(params, geometry, 2) == build(parsed("").complete({}), geometry, 2)


def test_blocks_that_prune_may_fuse_instead_and_older_studies_prune() -> None:
    geometry = GEOMETRIES["deit_tiny"]
    space = parsed('[reduction]\nprune_blocks=2\nprune_kind=["prune","fuse"]\nprune_score="ats"')
    params = space.complete({"prune_kind": "fuse"})
    shape = build(params, geometry, 2)
    assert shape.kinds == ("merge",) * 10 + ("fuse",) * 2
    assert shape.plan(geometry, 90).matching.prune_score == "ats"
    del params["prune_kind"]
    assert build(params, geometry, 2).kinds == ("merge",) * 10 + ("prune",) * 2


def test_a_model_without_a_class_token_never_hears_of_one() -> None:
    for name in space_names():
        bound = load_space(name).bind(GEOMETRIES["no_class_token"], 1)
        assert not bound.parameters["attention"].admits("class")
        assert not bound.parameters["prune_score"].admits("class")
        assert not bound.parameters["prune_score"].admits("ats")
        assert bound.parameters["last_block"] == Choices(("all",))


@given(st.integers(-64, 64), st.integers(0, 64), st.integers(0, 11))
def test_a_bound_offset_names_blocks_of_the_model_only(low: int, width: int, delay: int) -> None:
    high = min(low + width, 64)
    bound = parsed(f"[delay]\noffset=[{low},{high}]").bind(GEOMETRIES["deit_tiny"], delay)
    offset = bound.parameters["offset"]
    assert isinstance(offset, Range)
    assert 0 <= delay + offset.low <= delay + offset.high <= 11


def test_the_size_of_a_space_is_the_number_of_its_points() -> None:
    space = parsed('[delay]\noffset=[-1,1]\n[windows]\ngrowth=[0,4]\nquota=["equal","free"]')
    assert space.size == 3 * 5 * 2
    assert parsed("[reduction]\nslope=[0.0,0.1]").size == float("inf")


def test_whole_numbers_are_integers_however_they_are_written() -> None:
    space = parsed("[search]\ngeneration = 4.0\n[windows]\ngrowth = [0.0, 2.0]")
    assert type(space.generation) is int
    assert type(space.draw(Dice(0))["growth"]) is int


def test_every_shipped_space_can_meet_a_budget() -> None:
    geometry = GEOMETRIES["deit_tiny"]
    for name in space_names():
        bound = load_space(name).bind(geometry, 2)
        met = 0
        for seed in range(8):
            params = bound.draw(Dice(seed))
            limits = Limits(gmacs=0.75)
            plan = fit(
                build(params, geometry, 2),
                geometry,
                limits,
                lambda plan: Cost(plan.gmacs),
                share=params["cost_share"],
            )
            met += plan is not None
        assert met >= 4, name


# -- errors -----------------------------------------------------------------------------------

HUGE = "0x" + "f" * 6000  # Python reads it and refuses to print it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[delay]\noffset = true",
            "delay.offset must be an integer from -64 to 64, or [low, high], but got True",
        ),
        ("[delay]\noffset = 1.5", "delay.offset must be an integer"),
        ("[delay]\noffset = 65", "delay.offset must be an integer from -64 to 64"),
        ("[delay]\noffset = '1'", "but got '1'"),
        ("[delay]\noffset = []", "delay.offset must be"),
        ("[delay]\noffset = [1, 2, 3]", "but got [1, 2, 3]"),
        ("[delay]\noffset = {low = 1}", "delay.offset must be"),
        ("[delay]\noffset = 1979-05-27", "delay.offset must be"),
        (f"[delay]\noffset = {HUGE}", "but got a int too large to print"),
        (f"[delay]\noffset = [0, {HUGE}]", "too large to print"),
        (
            "[delay]\noffset = [1, -1]",
            "delay.offset: low <= high must hold, but got (low=1, high=-1)",
        ),
        (
            "[delay]\nofset = 1",
            "delay.'ofset' is not a key; did you mean 'offset'?; accepted are offset",
        ),
        ("delay = 1", "delay must be a table, but got 1"),
        ("[[delay]]\noffset = 1", "delay must be a table"),
        ("[dealy]\noffset = 1", "'dealy' is not a key; did you mean 'delay'"),
        ("surprise = 1", "'surprise' is not a key; accepted are format, description, search"),
        ("[reduction]\nslope = nan", "reduction.slope must be a number from -8 to 8"),
        ("[reduction]\nslope = [0.0, inf]", "reduction.slope must be a number"),
        ("[reduction]\ncost_share = 0", "reduction.cost_share must be a number from 0.05 to 1"),
        ("[reduction]\nlast_block = 'none'", "must be one of all, prefix, or a list of them"),
        ("[windows]\nquota = []", "windows.quota must be one of equal, free"),
        ("[windows]\nquota = ['equal', 'fair']", "windows.quota must be one of equal, free"),
        ("[windows]\nquota = [['equal']]", "windows.quota must be one of"),
        ("[matching]\nfeature = 'keys'", "matching.feature must be one of k, q"),
        ("[matching]\nproportional_attention = 1", "must be one of True, False"),
        (
            "[search]\nsampler = 'cma'",
            "search.sampler must be one of tpe_equal_cost, tpe, nsga2, gp, random",
        ),
        ("[search]\nsampler = ['tpe']", "search.sampler must be a single value"),
        ("[search]\ngeneration = 0", "search.generation must be an integer from 1 to 1024"),
        ("[search]\ngeneration = [4, 8]", "search.generation must be a single value"),
        ("[fidelity]\nimage_share = 0", "fidelity.image_share must be a number from 0.01 to 1"),
        ("enqueue = 1", "enqueue must be an array of tables, but got 1"),
        ("enqueue = [1]", "enqueue must be an array of tables"),
        ("[[enqueue]]\noffset = 2", "[0].offset must be an integer from 0 to 0, but got 2"),
        (
            "[[enqueue]]\n[[enqueue]]\nfeature = 'q'",
            "enqueue[1].feature must be one of k, but got 'q'",
        ),
        ("[[enqueue]]\noffest = 0", "[0].'offest' is not a key; did you mean 'offset'?"),
        (f"[[enqueue]]\noffset = {HUGE}", "enqueue[0].offset must be"),
        ("[delay", "a search space must be TOML in UTF-8"),
        ("a = 1\na = 2", "a search space must be TOML in UTF-8"),
        ("a = " + "[" * 5000, "a search space must be TOML in UTF-8"),
        ("a = " + "9" * 6000, "a search space must be TOML in UTF-8"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_an_error_names_file_key_value_and_what_is_accepted(text: str, said: str) -> None:
    with pytest.raises(SpaceError) as caught:
        parsed(text)
    message = str(caught.value)
    assert message.startswith("mine.toml: ")
    assert said in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "head",
    ["", 'format = "dsm_tune.space/2"\n', "format = 1\n", f"format = {HUGE}\n"],
    ids=lambda text: text[:40],
)
def test_another_format_is_refused(head: str) -> None:
    with pytest.raises(SpaceError, match=re.escape(f"mine.toml: format must be '{FORMAT}'")):
        parsed("[delay]\noffset = 1\n", head=head)


def test_bytes_that_are_not_utf_8_are_refused() -> None:
    with pytest.raises(SpaceError, match="must be TOML in UTF-8"):
        parse_space(b"\xff\xfe", "mine", "mine.toml")


def test_a_name_that_is_neither_file_nor_space_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SpaceError, match=r"one of default, .*'defualt'; did you mean 'default'\?"):
        load_space("defualt")


def test_a_folder_is_not_a_space(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="must be a TOML file or one of"):
        load_space(str(tmp_path))


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'format = "{FORMAT}"\n[search]\nsampler = "gp"\n')
    assert load_space(str(file)).sampler == "gp"
    assert load_space(str(file)).name == "mine"


@given(st.binary(max_size=60))
def test_any_bytes_are_a_space_or_a_space_error(content: bytes) -> None:
    refused_or_space(content)
    refused_or_space(f'format = "{FORMAT}"\n'.encode() + content)


words = st.sampled_from([*RULES, *(k for t in RULES.values() for k in t), "search", "enqueue"])
values = st.recursive(
    st.one_of(
        st.booleans().map(lambda b: str(b).lower()),
        st.integers(-5, 70).map(str),
        st.integers().map(str),
        st.floats().map(str),
        st.sampled_from(["'k'", "'class'", "'all'", "'equal'", "'tpe'", "''", HUGE, "1979-05-27"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.tuples(words, inner).map(lambda pair: f"{{{pair[0]} = {pair[1]}}}"),
    ),
    max_leaves=4,
)
lines = st.one_of(
    words.map("[{}]".format),
    words.map("[[{}]]".format),
    st.tuples(words, values).map(lambda pair: f"{pair[0]} = {pair[1]}"),
)


@given(st.lists(lines, max_size=6))
def test_any_document_of_known_words_is_a_space_or_a_space_error(document: list[str]) -> None:
    refused_or_space("\n".join([f'format = "{FORMAT}"', *document]).encode())


def refused_or_space(content: bytes) -> None:
    try:
        space = parse_space(content, "fuzz", "fuzz.toml")
    except SpaceError as error:
        said = str(error)
    else:
        said = ""
        build_all(space)
    assert "\n" not in said


def build_all(space: Space) -> None:
    geometry = GEOMETRIES["shallow"]
    bound = space.bind(geometry, 1)
    build(bound.draw(Dice(0)), geometry, 1).plan(geometry, 5)
    for point in bound.enqueued:
        build(bound.complete(point), geometry, 1).plan(geometry, 5)
