"""Values that someone might write into a configuration, and random changes of one that is right."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from deft_plugin import objective_names

WORDS = [
    *objective_names(),
    *("scope", "ema", "global", "fixed", "micro_batch", "floor_coefficient", "mean_probability"),
    *("decay", "minimum", "a", "k", "exponent", "normalizer", "entropy", "full", "top_k"),
    *(
        "path",
        "tile_rows",
        "skip_below",
        "histograms",
        "module",
        "auto",
        "chunked",
        "triton",
        "quack",
        "reference",
    ),
    *("", "auto ", "DEFT", "nan", "0.5", "é", "null", "true"),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 20, 10**30]),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from(WORDS),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), scalars), inner, max_size=3),
    ),
    max_leaves=6,
)
parameters = st.dictionaries(st.sampled_from(WORDS), values, max_size=4)


@st.composite
def changed(draw: st.DrawFn, right: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """A configuration with some keys left out, replaced or added."""
    configuration = dict(right)
    for key in draw(st.lists(st.sampled_from([*right, *keys]), min_size=1, max_size=3)):
        if key in configuration and draw(st.booleans()):
            del configuration[key]
        else:
            configuration[key] = draw(values)
    return configuration
