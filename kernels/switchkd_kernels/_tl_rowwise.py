"""The mathematics of a pair of rows in Triton: log-probabilities, divergences, gradients.

The Triton twin of rowwise.py, with its formulas and notation (p, q, d), in float32. A minimum or a
maximum takes the operand that is not NaN: that is how entries of -inf in both rows, where d is NaN,
p = q = 0 and every term is 0, cost nothing.
"""

from switchkd_kernels._tl import exp, exp_bend, expm1, log1p_parts, tl, triton


@triton.jit
def pair_of(teacher, student):
    """What `compare` needs of two rows, each (maximum, sum of exponentials): (teacher's maximum,
    log2 of its sum, student's maximum, log of the ratio of the sums)."""
    return teacher[0], tl.log2(teacher[1]), student[0], tl.log(student[1] / teacher[1])


@triton.jit
def compare(zt, zs, pair):
    """(log2 p, log2 q, d): d = log q - log p, NaN where both vanish.

    d is the difference of the logits, less that of the maxima, with which an offset of one model
    goes, though not the digits it has cost, less the log of the ratio of the sums, which errs by
    about one rounding. By `fma` the logarithms are rounded once, wherever they are computed.
    """
    t_top, t_log, s_top, log_ratio = pair
    d = ((zs - zt) - (s_top - t_top)) - log_ratio
    log_p = tl.fma(zt - t_top, 1.4426950408889634, -t_log)
    log_q = tl.fma(zs - s_top, 1.4426950408889634, -(t_log + log_ratio * 1.4426950408889634))
    return log_p, log_q, d


@triton.jit
def jsd_terms(log_p, log_q, d):
    """2 m h(tanh(d / 2)), m = (p + q) / 2, h(tanh s) = s tanh s - log cosh s, and log(q / m).

    With x = max(p, q), u = |d|, e = e^-u the first is x [(1 + e) a - u e], a = log(2 / (1 + e)) =
    log(x / m). u < 1: x u^2 and a polynomial in u; else a polynomial in e for a, with half a digit
    lost in the difference. log(q / m) is d / 2 - log cosh(d / 2). All minimax, within 6e-8.
    """
    u = tl.minimum(tl.abs(d), 100.0)  # not inf * 0, nor NaN: then p = q = 0
    e = exp(-u)
    near = 0.0007912093424238265 + u * -0.000106583240267355
    near = -0.005167488008737564 + u * near
    near = 0.031240088865160942 + u * near
    near = -0.12499910593032837 + u * near
    near = 0.2499999850988388 + u * near
    a = -0.1540471762418747 + e * 0.05939321592450142
    a = 0.2388925403356552 + e * a
    a = -0.33185845613479614 + e * a
    a = 0.4999017119407654 + e * a
    a = -0.9999973773956299 + e * a
    a = 0.6931471824645996 + e * a
    u2 = u * u
    value = tl.where(u < 1.0, u2 * near, (a + e * a) - u * e)
    bend = 0.0003440925502218306 + u2 * -2.2066172e-05
    bend = -0.005207462701946497 + u2 * bend
    bend = 0.12499993294477463 + u2 * bend
    signed = tl.where(d < 0.0, -u, u)
    score = tl.where(u < 1.0, 0.5 * signed - u2 * bend, a + tl.minimum(signed, 0.0))
    return tl.exp2(tl.maximum(log_p, log_q)) * value, score


@triton.jit
def kl_terms(x, y, d):
    """Terms y - x - x d >= 0 of KL(x||y), d = log y - log x < inf; a series near d = 0."""
    terms = tl.where(tl.abs(d) < 0.5, x * (d * d * exp_bend(d)), (y - x) - x * d)
    return tl.maximum(terms, 0.0)  # where x vanished and y is 0: NaN before


@triton.jit
def difference(p, q, d):
    """q - p, without cancellation where they are near."""
    return tl.where(tl.abs(d) < 0.5, p * (d + d * d * exp_bend(d)), q - p)


@triton.jit
def mixed_terms(x, other, d, weight):
    """Terms of KL(x||m), m = weight x + (1 - weight) other, then log(m / x) and m / x - 1.

    0 < weight < 1, d = log other - log x. With y = m / x - 1 the first is x (y - log(1 + y)). Where
    other is more than e^80 times x, y and the logarithm are too small, and x is 0.
    """
    y = (1.0 - weight) * expm1(tl.minimum(d, 80.0))
    log_m, near, bend = log1p_parts(y)
    far = (1.0 - weight) * (other - x) - x * log_m
    return tl.where(near, -x * bend, far), log_m, y


@triton.jit
def divergence_terms(log_p, log_q, d, weight, KIND: tl.constexpr, DETACH: tl.constexpr):
    """Terms of rowwise.values, and u = q dL/dq of rowwise.gradients: dL/dz = u - q sum u; and q.

    The two share their logarithms. For KL(p||q) u is q - p, the gradient itself: the sum that is
    taken off is 0 but for rounding, which it takes off, too.
    """
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    if KIND == "cross_entropy":  # no teacher, and its own terms are added elsewhere
        value, u = q * 0.0, q * 0.0
    elif KIND == "kl_teacher_student":
        d = tl.minimum(d, 100.0)
        value, u = kl_terms(p, q, d), difference(p, q, d)
    elif KIND == "kl_student_teacher":
        value, u = kl_terms(q, p, tl.minimum(-d, 100.0)), q * tl.maximum(d, -100.0)
    elif KIND == "tvd":
        sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
        value, u = 0.5 * tl.abs(difference(p, q, d)), q * sign
    elif KIND == "skew_kl":
        value, _, y = mixed_terms(p, q, d, weight)
        root = tl.rsqrt(1.0 + y)  # its square is p / m, cheaper than a division
        u = (1.0 - weight) * q * (y * root * root)
    elif KIND == "skew_reverse_kl":
        value, mix, y = mixed_terms(q, p, -d, weight)
        if not DETACH:
            root = tl.rsqrt(1.0 + y)
            mix -= weight * (y * root * root)
        u = -q * mix
    elif KIND == "jsd":
        value, score = jsd_terms(log_p, log_q, d)
        value, u = 0.5 * value, 0.5 * q * score
    else:
        tl.static_assert(KIND == "generalized_jsd")
        of_p, _, _ = mixed_terms(p, q, d, weight)
        of_q, mix, _ = mixed_terms(q, p, -d, 1.0 - weight)
        value, u = weight * of_p + (1.0 - weight) * of_q, (weight - 1.0) * q * mix
    return value, u, q
