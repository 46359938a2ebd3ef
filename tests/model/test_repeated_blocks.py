"""repeated_blocks: the members of stacks and the modules of declared classes, the outermost ones alone."""

from torch import nn

from bigq.model.repeated_blocks import repeated_blocks


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.single = Layer()

    def forward(self, x):
        return x


def test_members_of_a_stack_are_blocks_and_what_is_in_them_is_not():
    model = Model()
    del model.single
    assert repeated_blocks(model) == list(model.layers)


def test_a_module_of_a_declared_class_is_a_block():
    model = Model()
    model._no_split_modules = ["Layer"]
    assert repeated_blocks(model) == [*model.layers, model.single]


def test_composite_members_of_a_sequential_are_blocks():
    layers, head = [Layer(), Layer()], nn.Linear(2, 2)
    assert repeated_blocks(nn.Sequential(*layers, head)) == layers
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), head)) == []


def test_a_module_that_is_reached_twice_is_one_block():
    model = Model()
    del model.single
    model.again = model.layers
    assert repeated_blocks(model) == list(model.layers)
