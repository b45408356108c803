"""Moving statistics estimated anew at the anchor.

BatchNormalization's moving mean and variance are those of where the replicas have been in the
last steps. The outer step moves the anchor on from there, and what is validated and saved is the
anchor. So at the end of an epoch the last batches pass through the step function once more, at
the anchor: it calls its layers as it does in training, and its optimizers' updates are left out.
What the layers would have made of their moving statistics is caught on the way, and all other
state that the step has assigned is put back.
"""
