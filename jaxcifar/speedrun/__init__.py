"""CIFAR-10 in seconds: a whole training as one compiled program.

images      order, alternating flip, translation, cutout; the views of a test image
training    the start, one step, all steps
proxy       a small network that chooses the examples of every batch, where it is asked to
trainer     these as programs of a device: one of all steps, or a loop over steps on CPU
driver      N runs, timed: accuracies, seconds, versions
profile     what their operations take
rival       the same in PyTorch, in a process of its own: torch_rival, torch_network
__main__    the flags
"""
