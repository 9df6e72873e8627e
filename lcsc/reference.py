"""The whole method in plain numpy, to be read from top to bottom; the engine is tested against it.

LCSC (arXiv:2404.02241): training saved checkpoints theta_1 ... theta_K. Instead of the last one, or their moving
average, use theta = sum_k coef_k theta_k with sum_k coef_k = 1 and coefficients of any sign, searched so that the
images of theta are as close to real ones as possible, by the Fréchet distance of their features.

K = checkpoints, P = parameters of the network, N = images, D = features.
"""

import numpy as np


def combine(coef_K, W_KP):
    """The network at the given coefficients."""
    return coef_K @ W_KP


def sum_to_one(coef_K):
    """The nearest coefficients that sum to one: add the same to all, never divide (the sum may be near zero)."""
    return coef_K - (coef_K.sum() - 1) / len(coef_K)


def ema(steps, halflife):
    """An exponential moving average is a point of the same space: the usual choice, and the one to beat."""
    steps = np.asarray(steps, float)
    age = 0.5 ** ((steps[-1] - steps) / halflife)
    return age * np.append(1, 1 - 0.5 ** (np.diff(steps) / halflife))


def whitened_axes(W_KP, whitening=0.5):
    """Axes in coefficient space along which unit steps are comparable moves in weight space.

    Neighbouring checkpoints are nearly parallel: a coefficient of 6 here and -6 there can leave the network where
    it is. The singular directions of the deltas say which combinations move it, and how far.
    """
    K = len(W_KP)
    plane_ZK = np.linalg.svd(np.ones((1, K)))[2][1:]  # directions that keep the sum
    delta_KP = W_KP - W_KP.mean(0)
    variance_Z, turn_ZZ = np.linalg.eigh(plane_ZK @ (delta_KP @ delta_KP.T) @ plane_ZK.T)
    spread_Z = np.sqrt(np.maximum(variance_Z, 1e-6 * variance_Z[-1]))
    stretch_Z = (np.exp(np.log(spread_Z).mean()) / spread_Z) ** whitening / np.sqrt(K)
    return plane_ZK.T @ turn_ZZ * stretch_Z


def schedule(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels from sigma_max to sigma_min, then 0 (arXiv:2206.00364, Eq. 5)."""
    ramp = np.linspace(0, 1, num_steps)
    sigma = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(sigma, 0.0)


def euler(denoise, noise, num_steps):
    """Images from noise in `num_steps` network evaluations: the probability-flow ODE, one Euler step a level."""
    sigma = schedule(num_steps)
    x = noise * sigma[0]
    for now, then in np.stack([sigma[:-1], sigma[1:]], axis=1):
        x = x + (then - now) * (x - denoise(x, now)) / now
    return x


def frechet(features_ND, reference_ND):
    """Squared Fréchet distance of two feature sets, each taken as a Gaussian (arXiv:1706.08500)."""
    mean_a, mean_b = features_ND.mean(0), reference_ND.mean(0)
    cov_a, cov_b = np.cov(features_ND.T), np.cov(reference_ND.T)
    value, vector = np.linalg.eigh(cov_b)
    root = (vector * np.sqrt(np.maximum(value, 0))) @ vector.T  # symmetric: eigenvalues stay real
    cross = np.linalg.eigvalsh(root @ cov_a @ root)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * np.sqrt(np.maximum(cross, 0)).sum()


def search(W_KP, score, init_K, num_trials, rng, num_parents=10, step=1.0):
    """An evolution strategy in whitened coordinates: the simplest search that shows the method.

    `score(coef_K, seed)` makes images with the noise of `seed` and returns their distance to the real ones. All
    candidates share the noise of seed 0; the winner is chosen among the ten best by seed 1, whose noise no candidate
    was fitted to; a third seed, the caller's, is for the number to report.
    """
    axes_KZ = whitened_axes(W_KP)
    center_Z, tried = np.zeros(axes_KZ.shape[1]), []
    while len(tried) < num_trials:
        z = center_Z + step * rng.standard_normal(len(center_Z))
        coef_K = sum_to_one(init_K + axes_KZ @ z)
        tried.append((score(coef_K, 0), z, coef_K))
        tried.sort(key=lambda trial: trial[0])
        center_Z = np.mean([z for _, z, _ in tried[:num_parents]], axis=0)
        step *= 0.99
    return min((coef_K for _, _, coef_K in tried[:10]), key=lambda coef_K: score(coef_K, 1))


# A problem to try it on: networks that denoise a Gaussian exactly, D(x; sigma) = m + s^2 / (s^2 + sigma^2) (x - m).
# Run this file: the combination finds the true mean and spread, which no average of the checkpoints reaches.
def toy(num_checkpoints=12, seed=0):
    """Checkpoints (m, s) scattered on the way to the truth, the score, and the steps they were saved at."""
    rng = np.random.default_rng(seed)
    truth = np.array([0.6, -0.3, 0.2, 0.1])  # two means, two spreads
    path = np.linspace(0.2, 0.9, num_checkpoints)[:, None]
    W_KP = truth * path + 0.3 * (1 - path) + rng.normal(0, 0.05, (num_checkpoints, 4))
    real = truth[:2] + truth[2:] * rng.standard_normal((2000, 2))

    def score(coef_K, seed):
        mean, spread = np.split(combine(coef_K, W_KP), 2)
        noise = np.random.default_rng([seed, 99]).standard_normal((500, 2))
        images = euler(lambda x, s: mean + spread**2 / (spread**2 + s**2) * (x - mean), noise, num_steps=20)
        return frechet(images, real)

    return W_KP, score, 25 * np.arange(1, num_checkpoints + 1)


if __name__ == "__main__":
    W_KP, score, steps = toy()
    best_ema = min((ema(steps, h) for h in (5, 10, 25, 50, 100)), key=lambda coef_K: score(coef_K, 0))
    found = search(W_KP, score, best_ema, 600, np.random.default_rng(0))
    print(f"last {score(np.eye(12)[-1], 2):.4f}   best EMA {score(best_ema, 2):.4f}   LCSC {score(found, 2):.4f}")
