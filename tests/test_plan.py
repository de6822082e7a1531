"""The merge plan as data: its laws, its JSON, its digest."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from dsm_tune.errors import PlanError
from dsm_tune.plan import (
    ATTENTIONS,
    FEATURES,
    FORMAT,
    HEADS,
    LARGEST,
    NORMS,
    POSITIONS,
    PRUNE_SCORES,
    QUOTAS,
    Geometry,
    Matching,
    MergePlan,
    Step,
)

TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")
ONE_LINE = r"^[^\n]{1,600}$"


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    head = draw(st.sampled_from(HEADS))
    least = {"token": 1, "distilled": 2}.get(head, 0)
    heads = draw(st.integers(1, 16))
    return Geometry(
        grid=(draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        prefix=draw(st.integers(least, 6)),
        depth=draw(st.integers(1, 33)),
        width=heads * draw(st.integers(1, 100)),
        heads=heads,
        hidden=draw(st.integers(0, 5000)),
        patch=draw(st.integers(1, 32)),
        classes=draw(st.integers(0, 22_000)),
        head=head,
    )


matchings = st.builds(
    Matching,
    feature=st.sampled_from(FEATURES),
    quota=st.sampled_from(QUOTAS),
    position=st.sampled_from(POSITIONS),
    salience=st.sampled_from([0.0, 0.0, 0.25]) | st.floats(0, 100),
    attention=st.sampled_from(ATTENTIONS),
    size_penalty=st.sampled_from([0.0, 0.0, 0.1]) | st.floats(0, 100),
    attention_weight=st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0, 100),
    norm=st.sampled_from(NORMS),
    prune_score=st.sampled_from(PRUNE_SCORES),
    seed=st.integers(0, LARGEST),
)


@st.composite
def plans(draw: st.DrawFn, shape: Geometry | None = None) -> MergePlan:
    geometry = draw(geometries()) if shape is None else shape
    blocks = draw(st.sets(st.integers(0, geometry.depth - 1), max_size=8))
    steps = tuple(
        Step(
            block,
            draw(st.sampled_from(["merge", "prune", "fuse"])),
            draw(st.sampled_from([0, 1]) | st.integers(0, 2 * geometry.patches)),
            draw(st.none() | st.integers(1, 45)),
        )
        for block in sorted(blocks)
    )
    last = draw(st.sampled_from(["all", "prefix"] if geometry.reads_prefix_only else ["all"]))
    if last == "prefix":
        steps = tuple(step for step in steps if step.block < geometry.depth - 1)
    matching = draw(matchings)
    if not geometry.prefix:
        matching = dataclasses.replace(matching, attention="received", prune_score="received")
    return MergePlan(draw(st.text()), geometry, steps, matching, draw(st.booleans()), last)


# Token counts


@given(plans())
def test_each_block_removes_what_it_says_and_never_more_than_there_is(plan: MergePlan) -> None:
    wanted = {step.block: step for step in plan.steps}
    depth, prefix = plan.geometry.depth, plan.geometry.prefix
    assert len(plan.removed) == depth
    assert len(plan.tokens) == depth + 1
    assert plan.tokens[0] == plan.geometry.tokens
    for block, removed in enumerate(plan.removed):
        entering = plan.tokens[block]
        if block < depth - 1 or plan.last_block == "all":
            assert plan.tokens[block + 1] == entering - removed
        step = wanted.get(block)
        if step is None:
            assert removed == 0
        elif step.kind == "merge":
            assert removed == min(step.r, (entering - prefix) // 2)
        else:
            assert removed == min(step.r, entering - prefix - 1)
        assert entering > prefix
    assert plan.tokens[-1] == prefix if plan.last_block == "prefix" else plan.tokens[-1] > prefix


@given(plans())
def test_active_steps_say_the_r_they_realise(plan: MergePlan) -> None:
    active = {step.block: step for step in plan.active_steps}
    for block, removed in enumerate(plan.removed):
        assert (block in active) == (removed > 0)
        if removed:
            assert active[block].r == removed
    again = dataclasses.replace(plan, steps=plan.active_steps)
    assert again.active_steps == plan.active_steps
    assert again.macs == plan.macs


@given(plans())
def test_the_cost_is_the_closed_form_of_the_method(plan: MergePlan) -> None:
    g, m = plan.geometry, plan.matching
    c, hidden = g.width, g.hidden
    steps = {step.block: step for step in plan.active_steps}
    total = (plan.tokens[0] - g.prefix) * c * 3 * g.patch**2
    total += c * g.classes * (2 if g.head == "distilled" else 1)
    for block in range(g.depth):
        n, after = plan.tokens[block], plan.tokens[block + 1]
        if plan.last_block == "prefix" and block == g.depth - 1:
            p = g.prefix  # keys and values of all tokens; the rest for the prefix alone
            total += 2 * n * c**2 + 2 * p * c**2 + 2 * p * n * c + 2 * p * c * hidden
            continue
        total += 4 * n * c**2 + 2 * n**2 * c + 2 * after * c * hidden
        step = steps.get(block)
        attention = {"class": n * c, "received": n**2 * c, "norm": 0, "ats": n * c}
        if step and step.kind == "merge":
            total += ((n + 1) // 2) * (n // 2) * m.feature_width(g)
            total += attention[m.attention] if m.salience or m.attention_weight else 0
        elif step:
            total += attention[m.prune_score]
    if g.head == "map":
        n = plan.tokens[-1] - g.prefix
        total += 2 * c**2 + 2 * n * c**2 + 2 * n * c + 2 * c * hidden
    assert plan.macs == total
    assert plan.gmacs == total / 1e9


@given(plans())
def test_the_dense_plan_removes_nothing(plan: MergePlan) -> None:
    dense = plan.dense()
    assert not any(dense.removed)
    assert set(dense.tokens) == {plan.geometry.tokens}
    assert dense.geometry == plan.geometry


@pytest.mark.parametrize(
    ("feature", "width"),
    [
        ("k", 64),
        ("q", 64),
        ("v", 64),
        ("x", 192),
        ("kv", 128),
        ("k_all", 192),
        ("kv_all", 384),
        ("random", 64),
    ],
)
def test_the_width_of_a_feature(feature: str, width: int) -> None:
    assert Matching(feature).feature_width(TINY) == width


# JSON


@given(plans())
@settings(max_examples=100)
def test_a_plan_survives_json(plan: MergePlan) -> None:
    text = plan.to_json()
    assert "\n" not in text
    again = MergePlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert hash(again) == hash(plan)
    assert MergePlan.from_json(json.dumps(json.loads(text), indent=2)) == plan
    assert (again.tokens, again.macs, again.digest) == (plan.tokens, plan.macs, plan.digest)


def document(**changes: Any) -> dict[str, Any]:
    plan = MergePlan("m", TINY, (Step(0, "merge", 3, 7), Step(1, "prune", 3)))
    return {**json.loads(plan.to_json()), **changes}


def test_options_that_are_left_out_have_their_defaults() -> None:
    body = document()
    short = {key: body[key] for key in ("format", "model", "geometry")}
    assert MergePlan.from_json(json.dumps(short)) == MergePlan("m", TINY)


PATHS = [
    *[(key,) for key in document()],
    *[("geometry", key) for key in document()["geometry"]],
    *[("matching", key) for key in document()["matching"]],
    *[("steps", 0, key) for key in document()["steps"][0]],
    ("geometry", "grid", 0),
    ("steps", 0),
]


def replaced(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = document()
    place: Any = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return body


WRONG = [
    -1,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**4000,
    -(10**4000),
    LARGEST + 1,
]
WRONG += ["", "\n", "x" * 100_000, "\ud800", [], [[]], {}, {"a": {"b": []}}, [None] * 5000]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_wrong_value_anywhere_is_refused_in_one_line_or_read_as_it_is(
    path: tuple[Any, ...],
) -> None:
    for value in WRONG:
        body = replaced(path, value)
        for read, source in ((MergePlan.from_dict, body), (MergePlan.from_json, json.dumps(body))):
            plan, message = read_or_refuse(read, source)
            assert "\n" not in message
            assert len(message) < 600
            if plan is not None:
                may = [("model",), ("steps",), ("matching",), ("steps", 0, "window")]
                assert path in may or (path[0] == "matching" and value == 1.5)
                assert MergePlan.from_json(plan.to_json()) == plan


def read_or_refuse(read: Any, source: Any) -> tuple[MergePlan | None, str]:
    """The plan, or the message of the only error that is allowed."""
    try:
        return read(source), ""
    except PlanError as error:
        return None, str(error)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([FORMAT, "merge", "prune", "token", "avg", "k", "all", "prefix"])
)
keys = st.sampled_from(
    [*document(), *document()["geometry"], *document()["matching"], *document()["steps"][0]]
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(keys | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=12,
)


def assert_refused_or_read(text: str) -> None:
    plan, message = read_or_refuse(MergePlan.from_json, text)
    assert "\n" not in message
    if plan is not None:
        assert MergePlan.from_json(plan.to_json()) == plan
        assert plan.digest


@given(anything)
@settings(max_examples=150)
def test_any_json_is_refused_or_read_and_raises_nothing_else(value: Any) -> None:
    assert_refused_or_read(json.dumps(value))


@given(st.sampled_from(PATHS), anything)
@settings(max_examples=400)
def test_any_json_anywhere_in_a_plan_is_refused_or_read_and_raises_nothing_else(
    path: tuple[Any, ...], value: Any
) -> None:
    assert_refused_or_read(json.dumps(replaced(path, value)))


@given(st.text() | st.binary())
def test_any_text_is_refused_in_one_line(text: Any) -> None:
    with pytest.raises(PlanError, match=r"^[^\n]*$"):
        MergePlan.from_json(text)


@given(st.integers(0, 400), st.sampled_from("{}[],:\"'0eE-.\\\x00"))
def test_a_damaged_file_is_refused_or_read_and_raises_nothing_else(at: int, character: str) -> None:
    text = json.dumps(document())
    assert_refused_or_read(text[:at] + character + text[at + 1 :])
    assert_refused_or_read(text[:at])


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_nesting_of_any_depth_is_refused_in_one_line(path: tuple[Any, ...]) -> None:
    body = json.dumps(replaced(path, "@"))
    limit = sys.getrecursionlimit()
    for depth in (10, limit // 2, *range(limit - 80, limit, 3), 20 * limit):
        with pytest.raises(PlanError, match=ONE_LINE):
            MergePlan.from_json(body.replace('"@"', "[" * depth + "]" * depth))


@pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["huge", "minus huge"])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_an_integer_too_large_to_print_is_refused_in_one_line(
    path: tuple[Any, ...], value: int
) -> None:
    with pytest.raises(PlanError, match=ONE_LINE):
        MergePlan.from_dict(replaced(path, value))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "a plan must be a JSON object"),
        (None, "a plan must be a JSON object"),
        ({}, f"format must be '{FORMAT}', but got None"),
        (
            document(format="dsm_tune.plan/2"),
            f"format must be '{FORMAT}', but got 'dsm_tune.plan/2'",
        ),
        (document(mathcing={}), "plan has the unknown key 'mathcing'; did you mean 'matching'"),
        (
            replaced(("geometry", "dept"), 1),
            "geometry has the unknown key 'dept'; did you mean 'depth'",
        ),
        (replaced(("matching", "fetaure"), "k"), "matching has the unknown key 'fetaure'"),
        (replaced(("steps", 0, "windows"), 1), r"steps\[0\] has the unknown key 'windows'"),
        ({"format": FORMAT, "model": ""}, "a plan must have the keys model and geometry"),
        (document(geometry={"grid": [1, 1]}), "geometry must have the key prefix"),
        (document(steps=[{}]), r"steps\[0\] must have the key block"),
        (document(steps={}), "steps must be a list of at most 1024 steps"),
        (document(steps=[{"block": 0}] * 2000), "steps must be a list of at most 1024 steps"),
        (
            document(steps=[{"block": 1}, {"block": 0}]),
            "steps must name ascending, distinct blocks",
        ),
        (
            document(steps=[{"block": 1}, {"block": 1}]),
            "steps must name ascending, distinct blocks",
        ),
        (document(steps=[{"block": 12}]), "step.block must be less than the depth 12, but got 12"),
        (
            replaced(("geometry", "width"), 193),
            "geometry.width must be a multiple of geometry.heads",
        ),
        (
            replaced(("geometry", "prefix"), 0),
            "geometry.prefix must count the tokens that a 'token' head",
        ),
        (replaced(("geometry", "depth"), 5000), "geometry.depth must be at most 1024"),
        (
            document(last_block="prefix", steps=[{"block": 11, "r": 1}]),
            "the last block must have no step",
        ),
        (document(proportional_attention=1), "proportional_attention must be true or false"),
        (document(model=None), "model must be a string"),
        (
            replaced(("matching", "salience"), -0.5),
            "matching.salience must be a number from 0.0 to 100.0",
        ),
        (replaced(("matching", "salience"), True), "matching.salience must be a number"),
        (replaced(("steps", 0, "r"), True), "step.r must be an integer from 0"),
    ],
)
def test_an_error_names_the_rule_the_place_and_the_value(body: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}") as error:
        MergePlan.from_json(json.dumps(body))
    assert "\n" not in str(error.value)


def test_attention_of_a_class_token_that_is_not_there_is_refused() -> None:
    bare = dataclasses.replace(TINY, prefix=0, head="avg")
    for matching, kind in [
        (Matching(salience=0.5), "merge"),
        (Matching(prune_score="class"), "prune"),
        (Matching(prune_score="ats"), "fuse"),
    ]:
        with pytest.raises(
            PlanError, match="must not be 'class' for a model without a class token"
        ):
            MergePlan("", bare, (Step(0, kind, 3),), matching)
    MergePlan("", bare, (Step(0, "merge", 3),), Matching(prune_score="class"))


def test_a_plan_is_frozen() -> None:
    plan = MergePlan("m", TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.model = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.geometry.depth = 3  # type: ignore[misc]


def test_a_huge_plan_is_read_and_costed_at_once() -> None:
    steps = [{"block": block, "r": 5, "window": 3} for block in range(1024)]
    body = document(steps=steps)
    body["geometry"].update(
        depth=1024, grid=[LARGEST, LARGEST], width=LARGEST, heads=1, hidden=LARGEST
    )
    plan = MergePlan.from_json(json.dumps(body))
    assert plan.gmacs > 1e20
    assert plan.tokens[-1] == LARGEST**2 + 1 - 5 * 1024


# Digest


def effect(plan: MergePlan) -> tuple[Any, ...]:
    """All that decides outputs and cost, computed apart from the plan's own digest."""
    grid, m, done = max(plan.geometry.grid), plan.matching, []
    for step, r in ((step, plan.removed[step.block]) for step in plan.steps):
        local = step.kind == "merge" and step.window is not None and step.window < grid
        if r:
            done.append((step.block, step.kind, r, step.window if local else None))
    kinds = {kind for _, kind, _, _ in done}
    options: dict[str, Any] = {}
    if "merge" in kinds:
        options["proportional"] = plan.proportional_attention
        options["penalty"] = m.size_penalty
        options["mean"] = (m.attention_weight, m.norm)
        looks = m.salience or m.attention_weight
        options["salience"] = (m.salience, m.attention) if looks else None
    if "prune" in kinds:
        options["score"] = m.prune_score
    if "merge" in kinds or ("prune" in kinds and m.prune_score == "norm"):
        options["feature"] = (m.feature, m.seed) if m.feature == "random" else m.feature
    if any(window for *_, window in done):
        options["windows"] = (m.quota, m.position)
    return plan.geometry, plan.last_block, tuple(done), tuple(sorted(options.items()))


SHAPE = Geometry((4, 5), 1, 3, 8, 2, 16, 2, 3, "token")


@given(plans(SHAPE), plans(SHAPE))
@settings(max_examples=200)
def test_digests_are_equal_exactly_for_plans_of_equal_effect(
    one: MergePlan, other: MergePlan
) -> None:
    assert (one.digest == other.digest) == (effect(one) == effect(other))


@given(plans(SHAPE), st.data())
@settings(max_examples=200)
def test_one_change_changes_the_digest_exactly_if_it_changes_the_effect(
    plan: MergePlan, data: st.DataObject
) -> None:
    field = data.draw(
        st.sampled_from([f.name for f in dataclasses.fields(Matching)] + ["steps", "rest"])
    )
    source = data.draw(plans(SHAPE))
    try:
        if field == "steps":
            other = dataclasses.replace(plan, steps=source.steps)
        elif field == "rest":
            other = dataclasses.replace(
                plan, proportional_attention=not plan.proportional_attention
            )
        else:
            value = getattr(source.matching, field)
            matching = dataclasses.replace(plan.matching, **{field: value})
            other = dataclasses.replace(plan, matching=matching)
    except PlanError:
        assume(False)
    assert (plan.digest == other.digest) == (effect(plan) == effect(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((Step(0, "merge", 5, 14),), (Step(0, "merge", 5, None),)),
        ((Step(0, "merge", 5, 99),), (Step(0, "merge", 5, None),)),
        ((Step(0, "merge", 0, 7),), ()),
        ((Step(0, "merge", 98),), (Step(0, "merge", 9999),)),
        ((Step(0, "prune", 195),), (Step(0, "prune", 9999),)),
        ((Step(0, "prune", 5, 7),), (Step(0, "prune", 5),)),
        (
            (Step(0, "merge", 98), Step(1, "merge", 49)),
            (Step(0, "merge", 98), Step(1, "merge", 50)),
        ),
    ],
)
def test_plans_of_equal_effect_have_one_digest(
    one: tuple[Step, ...], other: tuple[Step, ...]
) -> None:
    assert MergePlan("a", TINY, one).digest == MergePlan("b", TINY, other).digest


def test_the_digest_is_sixteen_hexadecimal_digits_and_stable() -> None:
    plan = MergePlan("m", TINY, (Step(2, "merge", 16, 7),))
    assert len(plan.digest) == 16
    assert int(plan.digest, 16) >= 0
    assert plan.digest == MergePlan.from_json(plan.to_json()).digest


def test_the_geometry_is_part_of_the_digest() -> None:
    digests = {
        MergePlan("", dataclasses.replace(TINY, **{name: value})).digest
        for name, value in [
            ("depth", 12), ("depth", 13), ("grid", (14, 15)), ("prefix", 2), ("width", 384),
            ("heads", 6), ("hidden", 800), ("patch", 14), ("classes", 10), ("head", "avg"),
        ]
    }  # fmt: skip
    assert len(digests) == 10
