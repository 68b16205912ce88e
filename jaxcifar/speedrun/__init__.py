"""CIFAR-10 in seconds: a whole training as one compiled program.

images      order, alternating flip, translation, cutout; the views of a test image
training    the start, one step, all steps
trainer     these as programs of a device: one of all steps, or a loop over steps on CPU
driver      N runs, timed: accuracies, seconds, versions
__main__    the flags
"""
