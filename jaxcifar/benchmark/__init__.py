"""jaxcifar beside PyTorch: one process per contender, measurements taken in turns, one table.

work            what is measured: names, recipes, --quick
driver          starts the contenders of each work, lets them take turns, collects
children        what this and other parents of child processes share
child           the other end: prepares, waits for "go", measures
jax_contender   jaxcifar as shipped: the programs of train.fit
torch_contender PyTorch eager as pytorch-cifar's users run it
torch_best      PyTorch at its best
choice          which form of a network that is, found within a time
torch_data      their input: Pillow and DataLoader, or batches on the device; inputs: the
                images; pillow_transforms, torch_augment: the transforms
torch_twins     the networks: the tests' PyTorch twins, by registered name
table, plot     the results as text, JSON rows and a figure
"""
