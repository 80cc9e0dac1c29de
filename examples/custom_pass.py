"""A pass of your own in the pipeline: a constant factor behind a linear layer moves into its weight."""

import torch
from torch import fx, nn

import sparsec
from sparsec.graph import fold_constants
from sparsec.sparsifiers import Magnitude

aten = torch.ops.aten


class FoldScale(sparsec.Pass):
    """linear(x, w, b) * c  -->  linear(x, w * c, b * c), for a number c."""

    name = "fold_scale"
    requires = ("normalised",)

    def run(self, gm: fx.GraphModule, ctx: object) -> int:
        found = [n for n in gm.graph.nodes if n.target is aten.mul.Tensor and isinstance(n.args[1], (int, float))]
        count = 0
        for node in found:
            linear, factor = node.args
            if linear.target is not aten.linear.default or len(linear.users) > 1:
                continue
            x, *constants = linear.args
            with gm.graph.inserting_before(linear):
                linear.args = (x, *(gm.graph.call_function(aten.mul.Tensor, (w, factor)) for w in constants))
            node.replace_all_uses_with(linear)
            gm.graph.erase_node(node)
            count += 1
        fold_constants(gm)  # w * c becomes one constant, with the recipe that loads other weights later
        return count


class Scaled(nn.Module):
    """Attention scores are often scaled behind the projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.query(x) * 0.125)


def main() -> None:
    torch.manual_seed(0)
    model = sparsec.sparsify(Scaled(256).eval(), Magnitude(0.9))
    x = torch.randn(16, 256)
    passes = sparsec.DEFAULT.insert_after("normalise", FoldScale())
    compiled = sparsec.compile(model, example_inputs=(x,), passes=passes, min_speedup=0)
    for name, code in sparsec.graphs(compiled):
        print(f"{name:>12}: {code.count('aten.mul')} multiplications left")
    print(sparsec.report(compiled))
    with torch.no_grad():
        print(f"largest difference: {(compiled(x) - model(x)).abs().max():.1e}")
    state = sparsec.dense_state_dict(compiled)  # the originals, before the factor
    print("state dict unchanged:", all(torch.equal(v, state[k]) for k, v in model.state_dict().items()))


if __name__ == "__main__":
    main()
