"""
Hope, slowly: one full copy of the weights per row, one token at a time, and `torch.autograd.grad` on the segment loss.

Written from the equations alone; it shares no code with the model but the names of the weights. The self-modifying memory
is its reference, `modeling_hope/memory_reference.py`.
"""

from functools import partial

import torch
from torch.nn.functional import cross_entropy, gelu, silu

from modeling_hope.memory_reference import SlowMemory


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh")}


def at(field, index):
    """Of a field that is one value for all layers or levels, or a list."""
    return field[index] if isinstance(field, list) else field


def capped(x, cap):
    return x if cap is None else cap * torch.tanh(x / cap)


class SlowHope:
    """
    Reads one row with its own copy of the weights. `outer`: keep the graph, for an outer gradient with respect to the
    slow weights, in which changes are constants.
    """

    def __init__(self, model, outer=False):
        self.config = c = model.config
        self.outer = outer
        self.slow = {name: tensor.detach().clone().requires_grad_(outer) for name, tensor in model.state_dict().items()}
        self.own = dict(self.slow)
        self.memories = {
            layer: SlowMemory(self._parameters(f"model.layers.{layer}.mixer."), c)
            for layer, kind in enumerate(c.layer_types)
            if kind == "hope_memory"
        }
        self.keys = [[] for _ in range(c.num_hidden_layers)]
        self.values = [[] for _ in range(c.num_hidden_layers)]
        self.seen = 0
        mlp = ["gate_proj", "up_proj", "down_proj"] if c.gated_mlp else ["up_proj", "down_proj"]
        self.maps = ["down_proj"] if c.cms_fast_weights == "down_proj" else mlp
        rates, decays = ([at(f, i) for i in range(len(c.cms_periods))] for f in (c.cms_learning_rates, c.cms_decay))
        self.levels = {}  # level -> names of its learned weights
        for layer, held in enumerate(c.cms_levels_per_layer):
            for index, level in enumerate(held):
                if c.cms_periods[level] is not None and rates[level] != 0:
                    names = [f"model.layers.{layer}.cms.levels.{index}.{m}.weight" for m in self.maps]
                    self.levels.setdefault(level, []).extend(names)
        self.rates, self.decays = rates, decays
        self.gathered = {
            level: {n: torch.zeros_like(self.own[n]) for n in names} for level, names in self.levels.items()
        }
        self.changes = {n: torch.zeros_like(self.own[n]) for names in self.levels.values() for n in names}
        self.initial = {n: torch.zeros_like(self.own[n]) for n in self.changes}
        self.momentum = {n: torch.zeros_like(self.own[n]) for n in self.changes}
        self.pairs = dict.fromkeys(self.levels, 0)
        self.updates = dict.fromkeys(self.levels, 0)
        self.segments = self.skipped = 0

    def _parameters(self, prefix):
        return {name[len(prefix) :]: tensor for name, tensor in self.slow.items() if name.startswith(prefix)}

    def norm(self, x, place):
        if self.config.norm_type == "rms_norm":
            return self.rms_norm(x, place)
        x = x - x.mean()
        x = x / (x.pow(2).mean() + self.config.rms_norm_eps).sqrt()
        return x * self.own[place + ".weight"] + self.own[place + ".bias"]

    def rms_norm(self, x, place):
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return x * (self.own[place + ".weight"] + self.config.norm_weight_offset)

    def normed(self, x, place, placement, side):
        return self.norm(x, place) if placement in (side, "both") else x

    def affine(self, place, x, bias):
        y = self.own[place + ".weight"] @ x
        return y + self.own[place + ".bias"] if bias else y

    def rotate(self, x, position, layer, again=False):
        c, rope = self.config, self.config.layer_ropes[layer]
        if rope is None:
            return x
        rope = c.rope_parameters if rope == "global" else c.local_rope_parameters
        turned = int(c.head_dim * rope.get("partial_rotary_factor", 1.0))
        x, rest = x[..., :turned], x[..., turned:]
        # Angles and their cosines are float32 in every Transformers model.
        inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, turned, 2).float() / turned)
        angle = position * (inverse / torch.tensor(rope.get("short_factor", 1.0)))
        # Some kinds of rope scale as well as turn, which a key that is turned again has had.
        scale = 1.0 if again else rope.get("attention_factor", 1.0)
        cos, sin = angle.cos().to(x) * scale, angle.sin().to(x) * scale
        one, two = x.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1)

    def attention(self, x, layer, position):
        c, w = self.config, f"model.layers.{layer}.mixer."
        q, k, v = (self.affine(w + f"{name}_proj", x, c.attention_bias) for name in "qkv")
        if c.qk_norm == "all":
            q, k = self.rms_norm(q, w + "q_norm"), self.rms_norm(k, w + "k_norm")
        q, k, v = (features.view(-1, c.head_dim) for features in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.rms_norm(q, w + "q_norm"), self.rms_norm(k, w + "k_norm")
        self.keys[layer].append(self.rotate(k, position, layer))
        self.values[layer].append(v)
        q = self.rotate(q, position, layer)
        sliding = c.layer_types[layer] == "sliding_attention"
        # Sinks move along with the window, in blocks of a quarter of it.
        window = at(c.sliding_window, layer) if sliding else position + 1
        sinks = at(c.attention_sinks, layer)
        moved = max(0, position - position % max(window // 4, 1) - window - sinks)
        in_view = [p for p in range(position + 1) if position - p < window or p < sinks]
        multiplier = at(c.attention_multiplier, layer) or c.head_dim**-0.5
        outputs = []
        for head in range(c.num_attention_heads):
            group = head * c.num_key_value_heads // c.num_attention_heads
            keys = [self.keys[layer][p][group] for p in in_view]
            if moved:
                keys = [
                    self.rotate(k, moved, layer, again=True) if p < sinks else k
                    for k, p in zip(keys, in_view, strict=True)
                ]
            scores = capped(torch.stack([q[head] @ key for key in keys]) * multiplier, c.attn_logit_softcapping)
            outputs.append(
                sum(s * self.values[layer][p][group] for s, p in zip(scores.softmax(0), in_view, strict=True))
            )
        return self.affine(w + "o_proj", torch.cat(outputs), c.attention_output_bias)

    def linear(self, name, x, mask):
        if self.config.cms_optimizer == "dgd" and name.split(".")[-1] in self.maps:
            self.penalty = self.penalty + mask * 0.5 * (self.own[name + ".weight"] @ x.detach()).pow(2).sum()
        return self.affine(name, x, self.config.mlp_bias)

    def mlp(self, x, place, mask):
        act, up = ACTIVATIONS[self.config.hidden_act], self.linear(place + "up_proj", x, mask)
        inner = act(self.linear(place + "gate_proj", x, mask)) * up if self.config.gated_mlp else act(up)
        return self.linear(place + "down_proj", inner, mask)

    def memory(self, x, layer, mask):
        c, w = self.config, f"model.layers.{layer}.cms."
        placements = [at(c.cms_norm_placement, level) for level in c.cms_levels_per_layer[layer]]
        if c.cms_variant != "independent":
            for i, placement in enumerate(placements):
                y = self.mlp(self.normed(x, f"{w}norms.{i}", placement, "pre"), f"{w}levels.{i}.", mask)
                x = x + c.residual_multiplier * self.normed(y, f"{w}output_norms.{i}", placement, "post")
            return x
        y = self.joined(self.normed(x, f"{w}norms.0", placements[0], "pre"), len(placements), w, mask)
        return x + c.residual_multiplier * self.normed(y, f"{w}output_norms.0", placements[0], "post")

    def joined(self, x, levels, w, mask):
        c, agg = self.config, w + "aggregation."
        outputs = torch.stack([self.mlp(x, f"{w}levels.{i}.", mask) for i in range(levels)])
        if c.cms_aggregation == "sum":
            return outputs.sum(0)
        if c.cms_aggregation == "concat":
            return self.own[agg + "proj.weight"] @ outputs.flatten()
        if c.cms_aggregation == "weighted_sum":
            shares = self.own[agg + "scores"].softmax(0)
        elif c.cms_aggregation == "gated":
            shares = (self.own[agg + "gate.weight"] @ x + self.own[agg + "gate.bias"]).softmax(0)
        else:
            query = self.own[agg + "query.weight"] @ x
            shares = torch.stack([query @ (self.own[agg + "key.weight"] @ o) for o in outputs])
            shares = (shares / c.hidden_size**0.5).softmax(0)
        return sum(s * o for s, o in zip(shares, outputs, strict=True))

    def token(self, token, position, mask):
        c = self.config
        x = self.own["model.embed_tokens.weight"][token] * c.embedding_multiplier
        if c.learned_positions:
            x = x + self.own["model.embed_positions.weight"][position]
        for layer in range(c.num_hidden_layers):
            place, mixer = f"model.layers.{layer}.", self.memories.get(layer)
            y = self.normed(x, place + "input_layernorm", c.norm_placement, "pre")
            y = mixer.step(y) if mixer else self.attention(y, layer, position)
            y = c.residual_multiplier * self.normed(y, place + "output_layernorm", c.norm_placement, "post")
            x = self.memory(x, layer, mask) + y if c.parallel_residual else self.memory(x + y, layer, mask)
        logits = self.own["lm_head.weight"] @ self.norm(x, "model.norm")
        return capped(logits / c.logits_scaling, c.final_logit_softcapping)

    def read(self, ids, learn):
        """Logits `[tokens, vocab]` of a whole stream from its start."""
        c = self.config
        segment = c.cms_periods[0] or len(ids)
        logits = []
        for start in range(0, len(ids), segment):
            stop = min(start + segment, len(ids))
            targets = [p for p in range(start + 1, stop) if learn[p]]
            whole = stop - start == segment and c.cms_periods[0] is not None
            learned = [n for names in self.levels.values() for n in names] if whole and targets else []
            for name, change in self.changes.items():
                self.own[name] = self.slow[name] + change
                self.own[name].requires_grad_()
            self.penalty = 0.0
            out = [self.token(ids[p], p, float(p + 1 in targets)) for p in range(start, stop)]
            logits += out if self.outer else [o.detach() for o in out]
            if learned:
                loss = sum(cross_entropy(out[p - 1 - start], torch.tensor(ids[p])) for p in targets)
                grads = torch.autograd.grad(
                    loss + self.penalty, [self.own[n] for n in learned], retain_graph=self.outer
                )
                self.gather(dict(zip(learned, grads, strict=True)), float(loss.detach()), len(targets))
            if not self.outer:
                self.keys = [[k.detach() for k in keys] for keys in self.keys]
                self.values = [[v.detach() for v in values] for values in self.values]
                for memory in self.memories.values():
                    memory.detach()
            if whole:
                self.act(stop)
        return torch.stack(logits)

    def gather(self, grads, loss, pairs):
        if loss / pairs < self.config.cms_surprise_threshold:
            self.skipped += 1
            return
        self.segments += 1
        for level, names in self.levels.items():
            self.pairs[level] += pairs
            for name in names:
                self.gathered[level][name] += grads[name]

    def act(self, position):
        c = self.config
        for level in sorted(self.levels, reverse=True):
            if position % c.cms_periods[level] or not self.pairs[level]:
                continue
            mean = {n: g / self.pairs[level] for n, g in self.gathered[level].items()}
            norm = sum(g.pow(2).sum() for g in mean.values()).sqrt()
            clip = 1.0 if c.cms_max_update_norm is None else min(1.0, c.cms_max_update_norm / float(norm))
            for name, g in mean.items():
                g = g * clip
                if c.cms_optimizer == "momentum":
                    self.momentum[name] = g = c.cms_momentum * self.momentum[name] + g
                self.changes[name] = (1 - self.decays[level]) * self.changes[name] - self.rates[level] * g
                self.gathered[level][name].zero_()
            self.pairs[level] = 0
            self.updates[level] += 1
            if c.cms_variant == "nested":
                for faster in range(level):
                    for name in self.levels.get(faster, []):
                        self.initial[name] = self.initial[name].lerp(self.changes[name], c.cms_nested_rate)
                        self.changes[name] = self.initial[name].clone()
