"""The step train: an adapter is trained on the quantised base model.

launch      where it runs: in this process, in one for each GPU, or on several nodes
trainer     the step: its inputs, the learner that suits them, the adapter that comes out
loop        the training loop, from the first step to the last
learner     what computes losses and gradients; with the engine
trl         or with TRL's losses
checkpoints checkpoints that survive kills
distributed what several processes and several nodes need

progress, report, trackers    what people see of it
"""
