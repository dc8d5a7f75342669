"""The GRPO sheet written out in plain Python loops, token by token, to check the library against.

`frozen` marks what the sheet puts under a stop-gradient: those quantities are computed from it while `lp` moves, so a
finite difference of `loss` over `lp` is the gradient the sheet asks for.
"""

import math

import numpy as np

B, T = 4, 5


def draw(seed, rows=B, width=T):
    """Random arrays of one batch; lengths from 0 to `width`, so some rows are fully masked."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (rows, width)) - 0.1
    return {
        "logps": old + rng.normal(0, 0.3, old.shape),
        "old_logps": old,
        "ref_logps": old + rng.normal(0, 0.4, old.shape),
        "sampling_logps": old + rng.normal(0, 0.1, old.shape),
        "entropies": rng.exponential(1.0, old.shape),
        "advantages": rng.normal(0, 1, rows),
        "token_advantages": rng.normal(0, 1, old.shape),
        "row_weights": rng.uniform(0.5, 1.5, (rows, 1)),
        "token_weights": rng.uniform(0.5, 1.5, old.shape),
        "mask": (np.arange(width) < rng.integers(0, width + 1, (rows, 1))).astype(float),
        "tool_mask": rng.integers(0, 4, old.shape).clip(0, 1).astype(float),
    }


def clip(x, low, high):
    return min(max(x, -math.inf if low is None else low), math.inf if high is None else high)


def kl(x, x_frozen, kind, bounded):
    def value(x, kind):
        if kind in ("k1", "kl"):
            return x
        if kind in ("k2", "mse"):
            return x * x / 2
        if kind == "abs":
            return abs(x)
        if bounded:
            return clip(math.exp(clip(-x, -20, 20)) + clip(x, -20, 20) - 1, -10, 10)
        return math.exp(-x) + x - 1

    if kind.endswith("+"):
        return value(x_frozen, kind[:-1]) + value(x, "k2") - value(x_frozen, "k2")
    return value(x, kind)


def rollout_weights(old, smp, m, mode, low, high):
    """[B][T] weights, a sequence weight repeated along its row."""
    result = []
    for o, s, mask in zip(old, smp, m, strict=True):
        gaps = [(a - b) if keep else 0.0 for a, b, keep in zip(o, s, mask, strict=True)]
        gaps = [sum(gaps)] * len(gaps) if mode.startswith("sequence") else gaps
        row = [math.exp(g) for g in gaps]
        if mode.endswith("truncate"):
            row = [clip(w, low, high) for w in row]
        else:
            row = [w if clip(w, low, high) == w else 0.0 for w in row]
        result.append(row)
    return result


def keep_mask(entropies, m, p):
    counted = entropies[m]
    if counted.size == 0:
        return m
    return m & (entropies >= np.quantile(counted, 1 - p))


class Case:
    """Arrays of one call as numpy, with the defaults the sheet gives to absent ones."""

    def __init__(self, arrays, options, call):
        self.o, self.call = options, call
        self.frozen = arrays["logps"]
        self.m = arrays["mask"] * arrays.get("tool_mask", np.ones_like(arrays["mask"])) != 0
        self.old = arrays.get("old_logps", self.frozen)
        self.smp = arrays.get("sampling_logps")
        self.ref, self.entropies = arrays.get("ref_logps"), arrays.get("entropies")
        adv = arrays["advantages"]
        self.adv = np.broadcast_to(adv[:, None], self.m.shape) if adv.ndim == 1 else adv
        self.row_advantages = adv.ndim == 1
        self.w = arrays.get("rollout_is_weights")
        self.sequence_weights = self.w is not None and self.w.shape[1] == 1
        if self.w is None and self.smp is not None and options.importance_sampling_correction:
            mode = options.importance_sampling_mode
            low, high = options.importance_sampling_clip_min, options.importance_sampling_clip_max
            self.w = np.array(rollout_weights(self.old, self.smp, self.m, mode, low, high))
            self.sequence_weights = mode.startswith("sequence")
        self.w = None if self.w is None else np.broadcast_to(self.w, self.m.shape)
        p = options.top_entropy_quantile
        self.keep = keep_mask(self.entropies, self.m, p) if p < 1 else self.m
        self.n = self.m.sum(1)

    def mean(self, row, b):
        """Mean of a row over its counted tokens, the count guarded."""
        return sum(x for x, keep in zip(row, self.m[b], strict=True) if keep) / max(self.n[b], 1)

    def log_ratio(self, lp, b, t):
        """log w at the chosen level."""
        level, d = self.o.importance_sampling_level, lp[b] - self.old[b]
        if level == "token":
            return d[t]
        if level == "sequence":
            return self.mean(d, b)
        return self.mean(self.frozen[b] - self.old[b], b) + lp[b, t] - self.frozen[b, t]

    def policy(self, lp, b, t):
        """Per-token policy loss before masks, weights and KL."""
        o, adv = self.o, self.adv[b, t]
        low, high = o.epsilon, o.epsilon if o.epsilon_high is None else o.epsilon_high
        if o.loss_type == "gmpo":
            q = []
            for i in range(lp.shape[1]):
                d = lp[b, i] - self.old[b, i]
                c = clip(d, -low, high)
                q.append(min(d, c) if self.adv[b, i] > 0 else max(d, c))
            kept = [x for x, keep in zip(q, self.keep[b], strict=True) if keep]
            return -adv * math.exp(sum(kept) / max(len(kept), 1))
        if o.loss_type == "vespo":
            return -self.phi(b, t) * adv * lp[b, t]
        if o.loss_type == "cispo":
            return -min(math.exp(self.log_ratio(self.frozen, b, t)), high) * adv * lp[b, t]
        rho = math.exp(self.log_ratio(lp, b, t))
        if o.loss_type == "sapo":
            tau = o.sapo_temperature_pos if adv > 0 else o.sapo_temperature_neg
            return -(4 / tau) / (1 + math.exp(-tau * (rho - 1))) * adv
        bounded = rho if o.delta is None else min(rho, o.delta)
        return -min(bounded * adv, clip(rho, 1 - low, 1 + high) * adv)

    def phi(self, b, t):
        o = self.o
        total = sum(clip(self.frozen[b, i] - self.old[b, i], -20, 20) for i in range(len(self.m[b])) if self.m[b, i])
        if self.w is not None:
            logs = [clip(math.log(max(w, 1e-300)), math.log(1e-8), 20) for w in self.w[b]]
            total += logs[0] if self.sequence_weights else sum(logs)
        log_w = clip(total, math.log(1e-8), 20)
        k, lam = (o.vespo_k_pos, o.vespo_lambda_pos) if self.adv[b, t] >= 0 else (o.vespo_k_neg, o.vespo_lambda_neg)
        return math.exp(lam + k * log_w - lam * math.exp(log_w))

    def token_kl(self, lp, b, t):
        x, frozen = lp[b, t] - self.ref[b, t], self.frozen[b, t] - self.ref[b, t]
        value = kl(x, frozen, self.o.kl_loss_type, self.o.kl_clip)
        return value * math.exp(self.log_ratio(lp, b, t)) if self.o.use_bias_correction_kl else value

    def kept_by_drift(self, b, t):
        if self.o.off_policy_mask_threshold is None or self.adv[b, t] >= 0:
            return True
        behaviour = self.old if self.smp is None else self.smp
        return self.mean(behaviour[b] - self.frozen[b], b) <= self.o.off_policy_mask_threshold

    def token(self, lp, b, t):
        loss = self.policy(lp, b, t) * self.kept_by_drift(b, t)
        if self.o.loss_type != "gmpo":
            loss *= self.keep[b, t]
        if self.w is not None and self.o.loss_type != "vespo":
            loss *= self.w[b, t]
        return loss + (self.o.beta * self.token_kl(lp, b, t) if self.o.beta else 0)

    def loss(self, lp):
        rows, width = self.m.shape
        sums = [sum(self.token(lp, b, t) for t in range(width) if self.m[b, t]) for b in range(rows)]
        name, steps = self.o.loss_type, self.call.get("accumulation_steps", 1)
        if name in ("dapo", "cispo", "vespo"):
            items = self.call.get("num_items_in_batch", self.m.sum())
            return sum(sums) / (max(items, 1) / self.call.get("num_processes", 1))
        if name in ("grpo", "sapo", "gmpo"):
            return sum(s / max(n, 1) for s, n in zip(sums, self.n, strict=True)) / rows / steps
        divisor = {"bnpo": max(self.m.sum(), 1), "luspo": rows, "dr_grpo": rows * (self.o.max_completion_length or 1)}
        return sum(sums) / divisor[name] / steps

    def gradient(self, h=1e-6):
        grad = np.zeros_like(self.frozen)
        for index in np.ndindex(grad.shape):
            step = np.zeros_like(grad)
            step[index] = h
            grad[index] = (self.loss(self.frozen + step) - self.loss(self.frozen - step)) / (2 * h)
        return grad

    def metrics(self):
        """The metrics of the sheet's section 10 that this loss type has."""
        lp, o, cells = self.frozen, self.o, [tuple(i) for i in np.argwhere(self.m)]
        low, high = o.epsilon, o.epsilon if o.epsilon_high is None else o.epsilon_high
        result = {}
        if o.beta:
            result["kl"] = sum(self.token_kl(lp, b, t) for b, t in cells) / max(len(cells), 1)
        if self.entropies is not None:
            result["entropy"] = self.entropies[self.m].sum() / max(len(cells), 1)

        def average(fraction):
            """Over rows for a ratio per row, over counted tokens otherwise."""
            per_row = o.importance_sampling_level == "sequence" and self.row_advantages and o.loss_type != "gmpo"
            if per_row:
                return np.mean([fraction(b, 0) for b in range(len(self.m))])
            return sum(fraction(b, t) for b, t in cells) / max(len(cells), 1)

        def ratio(b, t):
            if not self.n[b]:
                return 1.0  # no counted token: nothing to clip
            rho = math.exp(self.log_ratio(lp, b, t))
            return rho if o.delta is None else min(rho, o.delta)

        def is_low(b, t):
            if o.loss_type == "gmpo":
                return lp[b, t] - self.old[b, t] < -low and self.adv[b, t] < 0
            return ratio(b, t) < 1 - low and self.adv[b, t] < 0

        def is_high(b, t):
            if o.loss_type == "gmpo":
                return lp[b, t] - self.old[b, t] > high and self.adv[b, t] > 0
            return ratio(b, t) > 1 + high and self.adv[b, t] > 0

        if o.loss_type == "cispo":
            result["cispo_clip_ratio"] = average(
                lambda b, t: self.n[b] > 0 and math.exp(self.log_ratio(lp, b, t)) > high and self.adv[b, t] > 0
            )
        elif o.loss_type not in ("sapo", "vespo"):
            result["clip_ratio/low_mean"], result["clip_ratio/high_mean"] = average(is_low), average(is_high)
            result["clip_ratio/region_mean"] = average(lambda b, t: is_low(b, t) or is_high(b, t))
            fractions = [
                [np.mean([f(b, t) for t in np.flatnonzero(self.m[b])]) for b in range(len(self.m)) if self.n[b]]
                for f in (is_low, is_high)
            ]
            result["clip_ratio/low_min"] = min(fractions[0], default=0)
            result["clip_ratio/high_max"] = max(fractions[1], default=0)
        return result
