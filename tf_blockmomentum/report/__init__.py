"""What a run tells: its report, advice, timeline; and a plan before there is a run.

Only `callback` needs TensorFlow: the commands start without it.
"""
