"""KL, advantages and PPO's losses: hand-worked values, brute force, float64, and rows that are empty, equal or never end."""

from math import exp, isclose, log

import pytest
import torch
from torch import Tensor

from posttrain.losses.gae import gae, grpo, rloo, whiten
from posttrain.losses.kl import adapted, k1, k3
from posttrain.losses.ppo import PolicyTokens, ValueTokens, policy_loss, value_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_k3_is_never_negative_and_zero_where_nothing_moved() -> None:
    policy, reference = random(1000) * 3, random(1000, seed=1) * 3
    assert float(k3(policy, reference).min()) >= 0
    assert float(k3(policy, policy).abs().max()) == 0
    assert isclose(float(k3(torch.tensor(log(0.5)), torch.tensor(log(0.25)))), 0.5 - 1 + log(2), rel_tol=1e-6)


def test_both_estimators_are_unbiased() -> None:
    """Their expectations under the policy are the KL of two distributions over five tokens, summed exactly."""
    p, q = torch.softmax(random(5), 0), torch.softmax(random(5, seed=1), 0)
    kl = float((p * (p / q).log()).sum())
    for estimate in (k1, k3):
        assert isclose(float((p * estimate(p.log(), q.log())).sum()), kl, rel_tol=1e-9)


def test_the_coefficient_follows_the_kl() -> None:
    assert adapted(0.1, kl=6.0, target=6.0, completions=64, horizon=10_000) == 0.1
    assert isclose(adapted(0.1, kl=60.0, target=6.0, completions=100, horizon=1000), 0.1 * 1.02)
    assert isclose(adapted(0.1, kl=0.0, target=6.0, completions=100, horizon=1000), 0.1 * 0.98)


def brute_force(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    """A_t as the sum over k of (gamma lambda)^k delta_{t+k}, term by term."""
    n = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_brute_force(gamma: float, lam: float) -> None:
    """Rows of 7, 1 and 4 tokens and one of none, in one table."""
    lengths = (7, 1, 4, 0)
    reward, value = random(4, 7), random(4, 7, seed=1)
    mask = torch.tensor([[place < n for place in range(7)] for n in lengths])
    found = gae(reward_BL=reward, value_BL=value, mask_BL=mask, gamma=gamma, lam=lam)
    for row, n in enumerate(lengths):
        wanted = torch.tensor(brute_force(reward[row, :n].tolist(), value[row, :n].tolist(), gamma, lam), dtype=torch.float64)
        assert torch.allclose(found.advantage_BL[row, :n], wanted)
        assert torch.allclose(found.return_BL[row, :n], wanted + value[row, :n])
        assert (found.advantage_BL[row, n:] == 0).all()
        assert (found.return_BL[row, n:] == 0).all()


def test_lambda_one_is_return_minus_value() -> None:
    reward, value = random(3, 6), random(3, 6, seed=2)
    found = gae(reward_BL=reward, value_BL=value, mask_BL=torch.ones(3, 6), gamma=1.0, lam=1.0)
    returns = reward.flip(1).cumsum(1).flip(1)
    assert torch.allclose(found.advantage_BL, returns - value)
    assert torch.allclose(found.return_BL, returns)


def test_group_advantages() -> None:
    assert rloo(torch.tensor([[3.0, 0.0, 0.0]])).tolist() == [[3.0, -1.5, -1.5]]
    found = grpo(torch.tensor([[1.0, 3.0]]))
    assert found[0].tolist() == pytest.approx([-1 / 2**0.5, 1 / 2**0.5], rel=1e-3)
    for estimate in (rloo, grpo):
        assert estimate(torch.full((2, 4), 7.0)).tolist() == [[0.0] * 4] * 2, "equal rewards teach nothing"
        with pytest.raises(AssertionError):
            estimate(torch.ones(2, 1))


def test_rloo_leaves_each_one_out() -> None:
    score = random(5, 4)
    for i in range(4):
        others = [j for j in range(4) if j != i]
        assert torch.allclose(rloo(score)[:, i], score[:, i] - score[:, others].mean(1))


def test_whitening_sees_real_tokens_alone() -> None:
    x, mask = random(4, 9), torch.rand(4, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    x[~mask] = 1e6
    found = whiten(x, mask)
    assert abs(float(found[mask].mean())) < 1e-12
    assert isclose(float(found[mask].var()), 1.0, rel_tol=1e-6)
    assert (found[~mask] == 0).all()
    kept = whiten(x, mask, shift_mean=False)
    assert isclose(float(kept[mask].mean()), float(x[mask].mean()), rel_tol=1e-9)
    assert whiten(torch.tensor([5.0, 9.0]), torch.tensor([1, 0])).tolist() == [0.0, 0.0], "one token has no spread"
    assert whiten(torch.tensor([5.0]), torch.tensor([0])).tolist() == [0.0]


def test_before_the_first_update_nothing_moved() -> None:
    logprob = random(50).float()
    out = policy_loss(PolicyTokens(logprob, logprob.clone(), random(50, seed=1).float()), clip=0.2)
    assert float(out.metrics["ppo/ratio"]) == 50.0
    assert float(out.metrics["ppo/approximate_kl"]) == 0.0
    assert float(out.metrics["ppo/clip_fraction"]) == 0.0


def test_hand_worked_clipping() -> None:
    """Ratio 1.5 and advantage 2: the clipped 1.2 counts. Ratio 1.5 and advantage -2: the plain one does."""
    up = torch.tensor([log(1.5)])
    good = policy_loss(PolicyTokens(up, torch.zeros(1), torch.tensor([2.0])), clip=0.2)
    bad = policy_loss(PolicyTokens(up, torch.zeros(1), torch.tensor([-2.0])), clip=0.2)
    assert good.loss.item() == pytest.approx(-2.4)
    assert bad.loss.item() == pytest.approx(3.0)
    assert good.metrics["ppo/clip_fraction"].item() == 1
    assert bad.metrics["ppo/clip_fraction"].item() == 0
    value = value_loss(ValueTokens(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0])), clip=0.2)
    assert value.loss.item() == pytest.approx(0.5 * 1.8**2), "moved by 0.2 at most, and the worse of the two counts"
    assert value.metrics["ppo/value_clip_fraction"].item() == 1


def test_losses_and_gradients_match_float64_and_do_not_depend_on_the_cut() -> None:
    logprob, old, advantage, value, old_value, returns = (random(60, seed=s) for s in range(6))
    logprob, value = (old + 0.3 * logprob).requires_grad_(), value.requires_grad_()
    ratio = (logprob - old).exp()
    wanted = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
    moved = old_value + (value - old_value).clamp(-0.2, 0.2)
    wanted = wanted + 0.5 * torch.maximum((value - returns) ** 2, (moved - returns) ** 2).mean()
    in_logprob, in_value = torch.autograd.grad(wanted, [logprob, value])

    mine = [x.detach().float().requires_grad_() for x in (logprob, value)]
    rest = [x.float() for x in (old, advantage, old_value, returns)]
    total = torch.tensor(0.0)
    for rows in (slice(0, 13), slice(13, 60)):
        tokens = PolicyTokens(mine[0][rows], rest[0][rows], rest[1][rows])
        total = total + policy_loss(tokens, clip=0.2, step_tokens=60).loss
        values = ValueTokens(mine[1][rows], rest[2][rows], rest[3][rows])
        total = total + value_loss(values, clip=0.2, step_tokens=60).loss
    total.backward()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(mine[0].grad.double(), in_logprob, atol=1e-6)
    assert torch.allclose(mine[1].grad.double(), in_value, atol=1e-6)


def test_the_policy_loss_reaches_the_tilted_optimum() -> None:
    """One prompt with six answers: repeated exact iterations end at pi_ref exp(r / beta) / Z."""
    reference, reward, beta = torch.log_softmax(random(6), 0), random(6, seed=1), 0.7
    wanted = torch.softmax(reference + reward / beta, 0)
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.02)
    for _ in range(1500):
        old = torch.log_softmax(logits, 0).detach()
        penalised = reward - beta * k1(old, reference)
        advantage = penalised - (old.exp() * penalised).sum()
        for _ in range(2):
            optimiser.zero_grad()
            now = torch.log_softmax(logits, 0)
            # every answer once, weighed by how often the old policy gives it: the expectation instead of samples
            loss = policy_loss(PolicyTokens(now, old, advantage * old.exp()), clip=0.2, step_tokens=1).loss
            loss.backward()
            optimiser.step()
    distance = 0.5 * float((torch.softmax(logits.detach(), 0) - wanted).abs().sum())
    assert distance < 1e-2, f"total variation {distance:.4f}"
    assert exp(float(torch.log_softmax(logits.detach(), 0).max())) < 1


@pytest.mark.parametrize("moved", [False, True])
def test_the_entropy_bonus_has_the_gradient_of_the_entropy(moved: bool) -> None:
    """Every token of an enumerable policy as often as who sampled takes it; also where the policy has moved since."""
    generator = torch.Generator().manual_seed(0)
    z_V = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    old_V = torch.log_softmax(z_V.detach() + (torch.randn(7, generator=generator) if moved else 0), 0)
    logprob_V = torch.log_softmax(z_V, 0)
    losses = torch.stack(
        [
            policy_loss(
                PolicyTokens(new[None], old[None], torch.zeros(1, dtype=torch.float64)), clip=0.2, entropy_coef=0.3
            ).loss
            for new, old in zip(logprob_V, old_V, strict=True)
        ]
    )
    (found,) = torch.autograd.grad((old_V.exp() * losses).sum(), z_V, retain_graph=True)
    (wanted,) = torch.autograd.grad(-0.3 * -(logprob_V.exp() * logprob_V).sum(), z_V)
    assert torch.allclose(found, wanted, atol=1e-12)
