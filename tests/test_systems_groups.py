"""More published systems that the sparsifiers implement: groups, masks, edges, and searches."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from test_systems_sparsifiers import accuracy, digits, mlp, train, zeros
from torch import nn

from sparsec.sparsifiers import (
    Calibration,
    Compose,
    Cubic,
    Fairness,
    GlobalShare,
    Gradual,
    Magnitude,
    Random,
    Sample,
    SparseUpdate,
    calibrate,
    sparsify,
)
from sparsec.sparsifiers.evaluate import agreement, class_gaps, random_search
from sparsec.sparsifiers.fine_tuning import PartialLinear
from sparsec.sparsifiers.gradients import log_likelihoods
from sparsec.sparsifiers.gradual import apply_delta, selective_decay
from sparsec.sparsifiers.layers import find_layers
from sparsec.sparsifiers.scores import AbsValue, EdgeDegree, SketchProbability, edge_degrees
from sparsec.sparsifiers.selectors import envelope_prox, envelope_weights
from sparsec.sparsifiers.variational import VariationalDropout, VariationalLinear

# WGSEF


def numeric_prox(v: np.ndarray, k: int, lam: float) -> np.ndarray:
    """argmin_w |w - v|^2 / 2 + lam * s_k(w), s_k by its definition as a minimum over shares: accelerated projected
    gradient on the shares u, for each of which w is v u / (u + lam)."""

    def project(u: np.ndarray) -> np.ndarray:
        if np.clip(u, 0, 1).sum() <= k:
            return np.clip(u, 0, 1)
        low, high = u.min() - 1, u.max()
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if np.clip(u - middle, 0, 1).sum() > k else (low, middle)
        return np.clip(u - high, 0, 1)

    squares = np.square(v).sum(1)
    slope = lambda u: -lam / 2 * squares / (u + lam) ** 2  # noqa: E731
    step = lam**2 / squares.max()
    u = ahead = project(np.full(len(v), k / len(v)))
    for i in range(1, 4001):
        new = project(ahead - step * slope(ahead))
        if i > 10 and np.abs(new - ahead).max() < 1e-14:
            break
        restart = float((ahead - new) @ (new - u)) > 0
        ahead, u = new if restart else new + (i % 100) / (i % 100 + 3) * (new - u), new
    return v * (u / (u + lam))[:, None]


@pytest.mark.parametrize(("lam", "k"), [(0.1, 2), (1.0, 1), (1.0, 4), (10.0, 2)])
def test_wgsef_prox_is_the_numeric_minimiser(lam: float, k: int) -> None:
    v = torch.randn(5, 3, dtype=torch.float64)
    found = envelope_prox(v, k, lam)
    np.testing.assert_allclose(found.numpy(), numeric_prox(v.numpy(), k, lam), atol=1e-6, rtol=0)
    shares = envelope_weights(v.norm(dim=1).numpy(), k, lam)
    assert shares.sum() == pytest.approx(k)

    def objective(w: torch.Tensor, u: np.ndarray) -> float:
        used = u > 0
        envelope = float((w.square().sum(1).numpy()[used] / u[used]).sum()) / 2
        return float((w - v).square().sum()) / 2 + lam * envelope

    best, rng = objective(found, shares), np.random.default_rng(0)
    for _ in range(50):  # no pair of values and shares near it does better
        u = np.clip(shares + 0.05 * rng.normal(size=5), 1e-9, 1)
        w = found + 0.05 * torch.from_numpy(rng.normal(size=(5, 3)))
        assert objective(w, u * min(1.0, k / u.sum())) >= best
    torch.testing.assert_close(envelope_prox(v, 5, lam), v / (1 + lam))  # all groups: the ridge prox


def test_wgsef_reaches_exactly_k_groups_as_it_grows() -> None:
    v = torch.randn(12, 4, dtype=torch.float64)
    alive = [int((envelope_prox(v, 3, lam).abs().sum(1) > 0).sum()) for lam in (0.01, 0.1, 1.0, 10.0, 1e3)]
    assert alive == sorted(alive, reverse=True) and alive[-1] == 3 and alive[0] > 3


def test_wgsef_leaves_exactly_k_hidden_units_of_a_digits_network() -> None:
    dense, model, k = accuracy(train(mlp(0), 250)), mlp(0), 32
    weight = model[0].weight  # type: ignore[union-attr]
    lams = iter([0.02] * 130 + [1e6])  # proximal steps, then the limit, which chooses
    alive: list[torch.Tensor] = []

    @torch.no_grad()
    def step() -> None:
        lam = next(lams, None)
        found = envelope_prox(weight, k, lam) if lam is not None else weight
        if lam == 1e6:
            alive.append(found.abs().sum(1, keepdim=True) > 0)
        weight.copy_(found if lam is not None and not alive else weight * alive[0])

    train(model, 250, step)
    assert int((weight != 0).any(1).sum()) == k and accuracy(model) >= dense - 0.02


# FISH mask


def test_fish_mask_scores_and_fixed_updates() -> None:
    x = digits()[0]
    model = mlp(0, 16)
    data = Calibration([x[:24]], loss=log_likelihoods)
    scores = {s: t.get("fisher") for s, t in calibrate(model, data, needs=("fisher",)).items() if t is not None}
    assert set(scores) == {"0", "2", "4"}
    update = SparseUpdate.top(model, scores, 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, 20, update.step)
    changed = sum(int((a != b).sum()) for a, b in zip(before, model.parameters()))
    inside = [
        update.masks.get(n.removesuffix(".weight")) if n.endswith("weight") else None
        for n, _ in model.named_parameters()
    ]
    for a, b, mask in zip(before, model.parameters(), inside):  # outside of the masks every bit is as it was
        assert torch.equal(a if mask is None else a[~mask], b if mask is None else b[~mask])
    allowed = sum(int(m.sum()) for m in update.masks.values())
    assert allowed == round(0.01 * sum(s.numel() for s in scores.values())) and 0 < changed <= allowed
    delta = update.delta()
    assert sum(i.nbytes + v.nbytes for i, v in delta.values()) == 8 * allowed
    fresh = mlp(0, 16)
    apply_delta(fresh, delta)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters()))


def test_fish_mask_transfers_better_than_a_random_mask() -> None:
    """From the digits 0 to 4 to the digits 5 to 9 with 1 % of the weights."""
    x, y, test_x, test_y = digits()
    low = mlp(0)
    optimizer = torch.optim.Adam(low.parameters(), 3e-3)
    for part in torch.randint(int((y < 5).sum()), (200, 64), generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(low(x[y < 5][part]), y[y < 5][part]).backward()
        optimizer.step()
    label_loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    data = Calibration([(x[y >= 5][:150], y[y >= 5][:150])], loss=label_loss)
    scores = {s: t.get("fisher") for s, t in calibrate(low, data, needs=("fisher",)).items() if t is not None}
    chance = {s: torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) for s, t in scores.items()}
    found = []
    for ranks in (scores, chance):
        model = copy.deepcopy(low)
        update = SparseUpdate.top(model, ranks, 0.01)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for part in torch.randint(int((y >= 5).sum()), (150, 64), generator=torch.Generator().manual_seed(2)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[y >= 5][part]), y[y >= 5][part]).backward()
            optimizer.step()
            update.step()
        with torch.no_grad():
            found.append(float((model(test_x).argmax(1) == test_y)[test_y >= 5].float().mean()))
    assert found[0] > found[1] + 0.1, found


# S2FT


def test_s2ft_trains_a_slice_and_saves_its_activations_alone() -> None:
    linear, columns = nn.Linear(32, 8), [3, 17, 29, 5]
    partial, x = PartialLinear(linear, columns), torch.randn(10, 32, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = partial(x)
    torch.testing.assert_close(out, linear(x))
    activations = [t for t in saved if t.dim() == 2 and t.shape[0] == 10]
    assert [tuple(t.shape) for t in activations] == [(10, 4)]
    out.square().sum().backward()
    own, back = partial.slice.grad, x.grad
    x.grad = None
    linear(x).square().sum().backward()
    torch.testing.assert_close(own, linear.weight.grad[:, columns])
    torch.testing.assert_close(back, x.grad)
    with torch.no_grad():
        partial.slice.add_(0.1)
    merged = partial.merged()
    torch.testing.assert_close(merged(x), partial(x))
    merged.weight.data[:, columns] -= partial.adapter()
    torch.testing.assert_close(merged.weight, linear.weight)


# TEDDY


def test_teddy_edge_scores_and_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    upper = (torch.rand(20, 20, generator=generator) < 0.3).triu(1).float()
    adjacency = upper + upper.T
    degree = adjacency.sum(1)
    expected = torch.zeros(20, 20)
    for i in range(20):
        for j in range(20):
            if adjacency[i, j]:
                g = [sum(degree[u] ** -0.5 for u in adjacency[n].nonzero()[:, 0]) / degree[n] for n in (i, j)]
                expected[i, j] = g[0] / degree[i] * g[1] / degree[j]
    torch.testing.assert_close(edge_degrees(adjacency).float(), expected, rtol=1e-5, atol=1e-7)
    looped = nn.Linear(20, 20, bias=False)
    looped.weight = nn.Parameter(adjacency + torch.eye(20))
    edges, target = int((looped.weight != 0).sum()), 0.8
    pruned = sparsify(looped, Compose(target, EdgeDegree())).weight
    assert zeros(pruned) == round(target * 400) and int((pruned != 0).sum()) < edges
    assert bool((pruned.diagonal() == 1).all())  # self-loops stay


def test_teddy_keeps_what_a_graph_says_about_its_nodes() -> None:
    """A stochastic block model of two communities, weak features, two hops, ridge regression: 30 % of edges go."""
    lost = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(200) % 2
        chance = torch.where(labels[:, None] == labels, 0.12, 0.03)
        upper = (torch.rand(200, 200, generator=generator) < chance).triu(1).float()
        adjacency = upper + upper.T + torch.eye(200)
        features = torch.randn(200, 8, generator=generator) + 0.3 * (2 * labels[:, None] - 1)
        edges = int((adjacency != 0).sum()) - 200
        graph = nn.Linear(200, 200, bias=False)
        graph.weight = nn.Parameter(adjacency)
        gone = 1 - (200 + round(0.7 * edges)) / 200**2
        pruned = sparsify(graph, Compose(gone, EdgeDegree())).weight.detach()
        assert int((pruned != 0).sum()) == 200 + round(0.7 * edges)
        rates = []
        for found in (adjacency, pruned):
            degree = found.sum(1) ** -0.5
            hop = degree[:, None] * found * degree
            seen = torch.cat([hop @ (hop @ features), torch.ones(200, 1)], 1)
            train_x, goal = seen[:100], 2.0 * labels[:100] - 1
            weight = torch.linalg.solve(train_x.T @ train_x + 0.1 * torch.eye(9), train_x.T @ goal)
            rates.append(float(((seen[100:] @ weight > 0) == (labels[100:] == 1)).float().mean()))
        assert rates[0] > 0.9
        lost.append(rates[0] - rates[1])
    assert sum(lost) / len(lost) <= 0.02, lost


# Pruning at initialisation as sketching


def test_sketching_is_unbiased_and_its_error_falls_with_the_budget() -> None:
    layer, x = nn.Linear(32, 16, bias=False), torch.randn(32)
    full, errors = layer(x).detach(), []
    for sparsity in (0.75, 0.5, 0.25):
        method = [Compose(sparsity, SketchProbability(with_data=True), choose=Sample(s)) for s in range(300)]
        products = torch.stack([sparsify(layer, m, data=x[None])(x).detach() for m in method])
        sigma = products.std(0) / len(products) ** 0.5
        assert bool(((products.mean(0) - full).abs() <= 3 * sigma + 1e-6).all())
        errors.append(float((products - full).square().sum(1).mean()))
        # k draws with replacement, p ~ |w x|, would err by (sum |w x|)^2 / k at most; a sample without errs less
        terms = (layer.weight.detach() * x).abs().sum()
        assert errors[-1] <= float(terms) ** 2 / (512 * (1 - sparsity))
    assert errors == sorted(errors, reverse=True)


def test_a_sample_errs_less_than_the_largest_where_many_small_weights_matter() -> None:
    """Heavy-tailed weights of one sign: what top-k drops adds up, what a sample drops it makes up for."""
    layer, x = nn.Linear(256, 8, bias=False), torch.ones(256)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(8, 256, generator=torch.Generator().manual_seed(0)) ** -0.5)
    full = layer(x).detach()
    largest = (sparsify(layer, Magnitude(0.75))(x) - full).detach().norm()
    samples = [sparsify(layer, Compose(0.75, AbsValue(), choose=Sample(s)))(x).detach() for s in range(40)]
    assert torch.stack([(y - full).norm() for y in samples]).mean() < 0.5 * largest


# Irrelevant weights


def test_selective_decay_of_nothing_is_sgd_and_of_something_shrinks_what_does_not_matter() -> None:
    plain, decayed = mlp(0, 16), mlp(0, 16)
    train(plain, 5)
    train(decayed, 5, before=lambda: selective_decay(find_layers(decayed), 0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), decayed.parameters()))
    model = mlp(0)
    train(model, 250, before=lambda: selective_decay(find_layers(model), 0.02))
    plain = train(mlp(0), 250)
    rows = [accuracy(sparsify(m, Magnitude(0.9, scope="global"))) for m in (model, plain)]
    assert rows[0] > rows[1]


def test_selective_decay_and_iterative_pruning_reach_95_percent_on_digits() -> None:
    dense = accuracy(train(mlp(0, 256), 500))
    model = mlp(0, 256)
    pruner = Gradual(model, lambda s: Magnitude(s, scope="global"), Cubic(0.95, 50, 250, 10))
    train(model, 500, pruner.step, before=lambda: selective_decay(pruner.layers, 0.002))
    assert pruner.sparsity == pytest.approx(0.95, abs=1e-4)
    assert accuracy(model) >= dense - 0.015


# Balancing Act


def test_balancing_act_multipliers_rise_on_violated_groups_only() -> None:
    fair = Fairness([1.0, 1.0, 1.0], tolerance=0.05, rate=0.5)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    fair.observe(groups, torch.tensor([True, True, True, True, False, False]))
    assert fair.multipliers[2] > 0 and bool((fair.multipliers[:2] == 0).all())
    losses = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 3.0])
    assert float(fair.loss(losses, groups)) > float(losses.mean())
    assert float(Fairness([1.0] * 3).loss(losses, groups)) == float(losses.mean())


def test_balancing_act_lowers_the_worst_excess_gap_on_digits() -> None:
    x, y, test_x, test_y = digits()
    dense = train(mlp(0), 200)
    with torch.no_grad():
        reference, before = dense(x).argmax(1), dense(test_x).argmax(1)
    rates = [float((reference[y == c] == c).float().mean()) for c in range(10)]
    found = []
    for fair in (None, Fairness(rates, 0.0, 0.005, buffer=100)):
        model = sparsify(dense, Magnitude(0.95))
        keep = [(m.weight, m.weight != 0) for m in model if isinstance(m, nn.Linear)]

        def loss(output: torch.Tensor, labels: torch.Tensor, fair: Fairness | None = fair) -> torch.Tensor:
            losses = nn.functional.cross_entropy(output, labels, reduction="none")
            if fair is None:
                return losses.mean()
            fair.observe(labels, output.argmax(1) == labels)
            return fair.loss(losses, labels)

        train(model, 150, lambda keep=keep: [w.data.mul_(m) for w, m in keep], loss=loss)  # type: ignore[misc]
        with torch.no_grad():
            found.append(class_gaps(y, reference, model(x).argmax(1)))
    assert len(before) == len(test_y)
    assert found[1].worst_excess < found[0].worst_excess and found[1].overall < found[0].overall + 0.01


# Sparsified model twins


@cache
@torch.enable_grad()
def zoo() -> list[tuple[nn.Sequential, nn.Sequential]]:
    """Ten small nets of varied quality, each with a twin that variational dropout trained on from there."""
    x, y, _, _ = digits()
    found = []
    for seed in range(10):
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        train(plain, 40 + 20 * seed, seed=seed)
        layers = [VariationalLinear.of(plain[0], -6.0), VariationalLinear.of(plain[2], -6.0)]
        twin = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        noise = [m.log_sigma2 for m in layers]
        weights = [p for m in layers for p in (m.weight, m.bias)]
        adam = torch.optim.Adam([{"params": weights, "lr": 2e-3}, {"params": noise, "lr": 5e-2}])
        picks = torch.randint(len(x), (240, 96), generator=torch.Generator().manual_seed(seed))
        for step, pick in enumerate(picks):
            adam.zero_grad()
            penalty = layers[0].penalty() + layers[1].penalty()
            loss = nn.functional.cross_entropy(twin(x[pick]), y[pick]) + min(1.0, step / 120) / len(x) * penalty
            loss.backward()
            adam.step()
        found.append((plain, twin.eval()))
    return found


@torch.no_grad()
def test_twins_of_a_zoo_agree_less_the_sparser_and_variational_dropout_bears_more_zeros() -> None:
    _, _, x, _ = digits()
    levels = (0.3, 0.5, 0.8, 0.9)
    kappas, rates = np.zeros((2, 4)), np.zeros((2, 4))
    dense, halves = [], []
    for plain, twin in zoo():
        own = plain(x).argmax(1)
        for i, level in enumerate(levels):
            dropped = sparsify(twin, VariationalDropout.trained(GlobalShare(level), twin))
            for j, net in enumerate((sparsify(plain, Magnitude(level, scope="global")), dropped)):
                kappas[j, i] += agreement(own, net(x).argmax(1)) / 10
                rates[j, i] += accuracy(net) / 10
        assert sum(zeros(m.weight) for m in dropped if isinstance(m, nn.Linear)) == round(0.9 * 24 * 74)
        dense.append(accuracy(plain))
        halves.append(accuracy(sparsify(plain, Magnitude(0.5, scope="global"))))
    for row in kappas:
        assert bool((np.diff(row) < 0.005).all()) and row[0] > 0.85 and row[-1] < 0.75
    assert kappas[0, 0] > kappas[1, 0] and kappas[1, 2] > kappas[0, 2]  # the cross-over
    assert rates[1, 2] > rates[0, 2] + 0.05
    assert np.corrcoef(dense, halves)[0, 1] > 0.5


# Random search


def test_random_search_gains_nothing_over_a_random_mask() -> None:
    x, y, _, _ = digits()

    def start(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    gains = []
    for seed in range(3):
        candidates = [sparsify(mlp(seed), Random(0.8, seed=10 * seed + i)) for i in range(8)]
        best, losses = random_search(mlp(seed), candidates, start)
        assert losses[candidates.index(best)] == min(losses.values())  # type: ignore[arg-type]
        rates = []
        for model in (best, candidates[0]):
            keep = [(m.weight, m.weight != 0) for m in model if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
            train(model, 200, lambda keep=keep: [w.data.mul_(m) for w, m in keep], seed=seed)  # type: ignore[misc]
            rates.append(accuracy(model))
        gains.append(rates[0] - rates[1])
    assert abs(np.mean(gains)) < 0.02, gains
