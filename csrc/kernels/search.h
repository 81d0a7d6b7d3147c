/* The searches behind the K-quants and every quantizer that takes an importance matrix: for a group of n
 * weights x with importances w, the scale (and minimum) whose rounded codes lose least. They follow ggml's
 * operation for operation: fp32, no fusing, sums in element order, one lane per group. n, nmax and the other
 * plain arguments are constants where these are inlined.
 *
 * Source of the algorithms: ggml-quants.c of ggml. */
#include <math.h>
#include "lanes.h"
#include "tables.h"

#define AZQ_GROUP_EPS 1e-15f /* a group of smaller magnitudes counts as zero */

/* The first element whose magnitude is largest, with its sign; *none: lanes of nothing but zeros. */
LANE_INLINE vf first_largest(int n, const vf *x, vi *none) {
    vf amax = splat(0), max = splat(0);
    for (int i = 0; i < n; i++) {
        vf a = magnitude(x[i]);
        vi more = a > amax;
        amax = choose(more, a, amax);
        max = choose(more, x[i], max);
    }
    *none = amax < AZQ_GROUP_EPS;
    return max;
}

/* x ~ scale * (q - nmax), q in 0 .. 2 nmax - 1: least squares from 19 roundings. */
LANE_INLINE vf fit_symmetric(int n, int nmax, const vf *x, const vf *w, vi *q) {
    vi none;
    vf max = first_largest(n, x, &none);
    vf wx[32];
    for (int i = 0; i < n; i++) {
        wx[i] = w[i] * x[i];
    }
    vf scale = splat(0), best = splat(0), chosen = splat(0);
    for (int try = 0; try < 19; try++) {
        int step = try == 0 ? 0 : try <= 9 ? try - 10 : try - 9; /* 0, -9 .. -1, 1 .. 9 */
        vf inverse = -((float)nmax + 0.1f * (float)step) / max;
        vf sumlx = splat(0), suml2 = splat(0);
        for (int i = 0; i < n; i++) { /* |inverse * x| <= nmax + 0.9, but for groups of nothing, whose codes go */
            vf l = limit(whole(inverse * x[i]), (float)-nmax, (float)(nmax - 1));
            sumlx += wx[i] * l;
            suml2 += w[i] * l * l;
        }
        vi better = try == 0 ? suml2 != 0.0f : (suml2 > 0.0f) & (sumlx * sumlx > best * suml2);
        vf ratio = sumlx / suml2;
        scale = choose(better, ratio, scale);
        best = choose(better, ratio * sumlx, best);
        chosen = try == 0 ? inverse : choose(better, inverse, chosen);
    }
    for (int i = 0; i < n; i++) {
        q[i] = ~none & (clamp(nearest(chosen * x[i]), -nmax, nmax - 1) + nmax);
    }
    return choose(none, splat(0), scale);
}

/* As fit_symmetric with w = x^2, but by moving single codes while that helps (five rounds at most). */
LANE_INLINE vf fit_descent(int n, int nmax, const vf *x, vi *q) {
    vi none;
    vf max = first_largest(n, x, &none);
    vf inverse = -(float)nmax / max;
    vf sumlx = splat(0), suml2 = splat(0), code[16];
    for (int i = 0; i < n; i++) {
        vf w = x[i] * x[i];
        code[i] = to_float(clamp(nearest(inverse * x[i]), -nmax, nmax - 1));
        sumlx += w * x[i] * code[i];
        suml2 += w * code[i] * code[i];
    }
    for (int round = 0; round < 5; round++) {
        vi changed = {0};
        for (int i = 0; i < n; i++) {
            vf w = x[i] * x[i];
            vf slx = sumlx - w * x[i] * code[i];
            vf sl2 = suml2 - w * code[i] * code[i];
            vi open = slx > 0.0f;
            vf l = to_float(clamp(nearest(x[i] * sl2 / slx), -nmax, nmax - 1));
            slx += w * x[i] * l;
            sl2 += w * l * l;
            vi better = open & (l != code[i]) & (sl2 > 0.0f) & (slx * slx * suml2 > sumlx * sumlx * sl2);
            code[i] = choose(better, l, code[i]);
            sumlx = choose(better, slx, sumlx);
            suml2 = choose(better, sl2, suml2);
            changed |= better;
        }
        if (!any_lane(changed)) {
            break;
        }
    }
    for (int i = 0; i < n; i++) {
        q[i] = ~none & (__builtin_convertvector(code[i], vi) + nmax);
    }
    return choose(none | ~(suml2 > 0.0f), splat(0), sumlx / suml2);
}

/* x ~ scale * q - minimum, q in 0 .. nmax, minimum >= 0: nsteps + 1 roundings, each refitted by least squares,
 * judged by squared (or, with use_abs, absolute) error. */
LANE_INLINE vf fit_affine(int n, int nmax, float first, float delta, int nsteps, int use_abs, const vf *x,
                          const vf *w, vi *q, vf *minimum) {
    vf min = x[0], max = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < n; i++) {
        min = choose(x[i] < min, x[i], min);
        max = choose(x[i] > max, x[i], max);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    min = choose(min > 0.0f, splat(0), min);
    vi flat = max == min;
    vf inverse = splat((float)nmax) / (max - min);
    vf scale = 1.0f / inverse, best = splat(0), chosen = inverse, chosen_min = min, lowest = min;
    for (int i = 0; i < n; i++) {
        vf l = to_float(clamp(nearest(inverse * (x[i] - min)), 0, nmax));
        vf diff = scale * l + min - x[i];
        best += w[i] * (use_abs ? magnitude(diff) : diff * diff);
    }
    for (int step = 0; step <= nsteps; step++) {
        inverse = (first + delta * (float)step + (float)nmax) / (max - min);
        vf sum_l = splat(0), sum_l2 = splat(0), sum_xl = splat(0), code[32];
        for (int i = 0; i < n; i++) {
            code[i] = to_float(clamp(nearest(inverse * (x[i] - min)), 0, nmax));
            vf wl = w[i] * code[i];
            sum_l += wl;
            sum_l2 += wl * code[i];
            sum_xl += wl * x[i];
        }
        vf determinant = sum_w * sum_l2 - sum_l * sum_l;
        vi usable = determinant > 0.0f;
        vf fit = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        vf fit_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        vi positive = fit_min > 0.0f;
        fit_min = choose(positive, splat(0), fit_min);
        fit = choose(positive, sum_xl / sum_l2, fit);
        vf error = splat(0);
        for (int i = 0; i < n; i++) {
            vf diff = fit * code[i] + fit_min - x[i];
            error += w[i] * (use_abs ? magnitude(diff) : diff * diff);
        }
        vi better = usable & (error < best);
        best = choose(better, error, best);
        scale = choose(better, fit, scale);
        chosen = choose(better, inverse, chosen);
        chosen_min = choose(better, min, chosen_min);
        min = choose(better, fit_min, min); /* and the next rounding starts from it */
    }
    for (int i = 0; i < n; i++) {
        q[i] = ~flat & clamp(nearest(chosen * (x[i] - chosen_min)), 0, nmax);
    }
    *minimum = -choose(flat, lowest, min);
    return choose(flat, splat(0), scale);
}

/* Codes of IQ4's table nearest to x: ties go up. The numbers are whole, so comparing with the middle of two
 * decides as comparing the distances does. */
LANE_INLINE vf nearest_value(vf x, vi *code) {
    vi index = {0};
    vf value = splat(azq_iq4_values[0]);
    for (int i = 0; i < 15; i++) {
        vi above = ~(x < (azq_iq4_values[i] + azq_iq4_values[i + 1]) * 0.5f);
        index -= above;
        value = choose(above, splat(azq_iq4_values[i + 1]), value);
    }
    if (code) {
        *code = index;
    }
    return value;
}

/* x ~ scale * table[q] for IQ4's table, groups of 32. */
LANE_INLINE vf fit_table(const vf *x, const vf *w) {
    vi none;
    vf max = first_largest(32, x, &none);
    vf scale = splat(0), best = splat(0);
    for (int try = -1; try < 15; try++) {
        vf inverse = try < 0 ? 1.0f / (-max / azq_iq4_values[0]) : ((float)(try - 7) + azq_iq4_values[0]) / max;
        vf sumqx = splat(0), sumq2 = splat(0);
        for (int i = 0; i < 32; i++) {
            vf v = nearest_value(inverse * x[i], NULL);
            sumqx += w[i] * v * x[i];
            sumq2 += w[i] * v * v;
        }
        vi better = try < 0 ? sumq2 > 0.0f : (sumq2 > 0.0f) & (sumqx * sumqx > best * sumq2);
        vf ratio = sumqx / sumq2;
        scale = choose(better, ratio, scale);
        best = choose(better, ratio * sumqx, best);
    }
    return choose(none, splat(0), scale);
}

/* The scale of largest magnitude, with its sign; the first of equals. The magnitude has a variable of its own:
 * clang 19 takes the x of fabsf(x) > 0 ? x : 0 for positive and drops a fabsf of it (LLVM pull request 152913). */
static float strongest(int n, const float *scale) {
    float max = 0.0f, most = 0.0f;
    for (int g = 0; g < n; g++) {
        float size = fabsf(scale[g]);
        max = size > most ? scale[g] : max;
        most = size > most ? size : most;
    }
    return max;
}

/* Scales (or minima) x >= 0 of a super-block as x ~ scale * q, q in 0 .. nmax: nine roundings, then single
 * codes are moved while that helps. One group at a time: there are few of them. */
static float fit_positive(int n, int nmax, const float *x, const float *w, uint8_t *q) {
    float max = 0.0f;
    for (int i = 0; i < n; i++) {
        max = max > x[i] ? max : x[i];
    }
    if (max < AZQ_GROUP_EPS) {
        memset(q, 0, (size_t)n);
        return 0.0f;
    }
    float inverse = (float)nmax / max, best = 0.0f;
    for (int i = 0; i < n; i++) {
        float diff = x[i] - 1.0f / inverse * (float)azq_low_byte(azq_nearest(inverse * x[i]));
        best += w[i] * diff * diff;
    }
    for (int step = -4; step <= 4; step++) {
        float try = (0.1f * (float)step + (float)nmax) / max, scale = 1.0f / try, error = 0.0f;
        for (int i = 0; step != 0 && i < n; i++) {
            int32_t l = azq_nearest(try * x[i]);
            float diff = x[i] - scale * (float)(l < nmax ? l : nmax);
            error += w[i] * diff * diff;
        }
        if (step != 0 && error < best) {
            best = error;
            inverse = try;
        }
    }
    float sumlx = 0.0f, suml2 = 0.0f;
    for (int i = 0; i < n; i++) {
        int32_t l = azq_nearest(inverse * x[i]);
        l = l < nmax ? l : nmax;
        q[i] = azq_low_byte(l);
        sumlx += w[i] * x[i] * (float)l;
        suml2 += w[i] * (float)l * (float)l;
    }
    for (int round = 0, changed = 1; round < 5 && changed; round++) {
        changed = 0;
        for (int i = 0; i < n; i++) {
            float slx = sumlx - w[i] * x[i] * (float)q[i], sl2 = suml2 - w[i] * (float)q[i] * (float)q[i];
            if (!(slx > 0.0f && sl2 > 0.0f)) {
                continue;
            }
            int32_t l = azq_nearest(x[i] * sl2 / slx);
            l = l < nmax ? l : nmax;
            slx += w[i] * x[i] * (float)l;
            sl2 += w[i] * (float)l * (float)l;
            if (l != q[i] && slx * slx * suml2 > sumlx * sumlx * sl2) {
                q[i] = azq_low_byte(l);
                sumlx = slx;
                suml2 = sl2;
                changed = 1;
            }
        }
    }
    return suml2 > 0.0f ? sumlx / suml2 : 0.0f;
}
