"""All that is private of KerasTuner, each with its reason."""

from typing import Any


def resume_grid_search(oracle: Any) -> None:
    """Tells a reloaded grid search where it stands.

    KerasTuner 1.4.8 does not save that, and its next trial is a KeyError or the end of the
    search (keras-tuner issue 1055). Trials start in the grid's order, so it is known.
    """
    for trial_id in oracle.start_order:
        oracle._ordered_ids.insert(trial_id)
    oracle._populate_next.extend(oracle.end_order)
