"""Scores of HALO's method, for tests of ranking and of scores files."""

from hypothesis import strategies as st

from megatron_hypenet.stages.selection.method import LayerScores


def halo_scores(recall, commonsense) -> LayerScores:
    """Return the scores of as many layers as there are numbers."""
    values = {"recall": tuple(recall), "commonsense": tuple(commonsense)}
    return LayerScores(method="halo", num_layers=len(values["recall"]), values=values)


METRIC = st.floats(min_value=0, max_value=100, allow_nan=False)
SCORES = st.lists(st.tuples(METRIC, METRIC), min_size=1, max_size=40).map(
    lambda rows: halo_scores((r for r, _ in rows), (c for _, c in rows))
)
