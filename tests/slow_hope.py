"""
Hope, slowly: one full copy of the weights per row, one token at a time, and `torch.autograd.grad` on the segment loss.

Written from the equations alone; it shares no code with the model but the names of the weights. The self-modifying memory
is its reference, `modeling_hope/memory_reference.py`.
"""

import torch
from torch.nn.functional import cross_entropy, silu

from modeling_hope.memory_reference import SlowMemory


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
        self.maps = ["down_proj"] if c.cms_fast_weights == "down_proj" else ["gate_proj", "up_proj", "down_proj"]
        rates = (
            c.cms_learning_rates
            if isinstance(c.cms_learning_rates, list)
            else [c.cms_learning_rates] * len(c.cms_periods)
        )
        decays = c.cms_decay if isinstance(c.cms_decay, list) else [c.cms_decay] * len(c.cms_periods)
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

    def norm(self, x, name):
        return x / (x.pow(2).mean() + self.config.rms_norm_eps).sqrt() * self.own[name]

    def rotate(self, x, position):
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        # Angles and their cosines are float32 in every Transformers model.
        inverse = 1.0 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
        angle = position * inverse
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)

    def attention(self, x, layer, position):
        c, w = self.config, f"model.layers.{layer}.mixer."
        q = (self.own[w + "q_proj.weight"] @ x).view(c.num_attention_heads, c.head_dim)
        k = (self.own[w + "k_proj.weight"] @ x).view(c.num_key_value_heads, c.head_dim)
        v = (self.own[w + "v_proj.weight"] @ x).view(c.num_key_value_heads, c.head_dim)
        self.keys[layer].append(self.rotate(k, position))
        self.values[layer].append(v)
        q = self.rotate(q, position)
        sliding = c.layer_types[layer] == "sliding_attention"
        # Sinks move along with the window, in blocks of a quarter of it.
        window = c.sliding_window if sliding else position + 1
        moved = max(0, position - position % max(window // 4, 1) - window - c.attention_sinks)
        in_view = [p for p in range(position + 1) if position - p < window or p < c.attention_sinks]
        outputs = []
        for head in range(c.num_attention_heads):
            group = head * c.num_key_value_heads // c.num_attention_heads
            keys = [self.keys[layer][p][group] for p in in_view]
            if moved:
                keys = [
                    self.rotate(k, moved) if p < c.attention_sinks else k for k, p in zip(keys, in_view, strict=True)
                ]
            scores = torch.stack([q[head] @ key for key in keys]) / c.head_dim**0.5
            outputs.append(
                sum(s * self.values[layer][p][group] for s, p in zip(scores.softmax(0), in_view, strict=True))
            )
        return self.own[w + "o_proj.weight"] @ torch.cat(outputs)

    def linear(self, name, x, mask):
        y = self.own[name + ".weight"] @ x
        if self.config.cms_optimizer == "dgd" and name.split(".")[-1] in self.maps:
            self.penalty = self.penalty + mask * 0.5 * (self.own[name + ".weight"] @ x.detach()).pow(2).sum()
        return y

    def mlp(self, x, place, mask):
        inner = silu(self.linear(place + "gate_proj", x, mask)) * self.linear(place + "up_proj", x, mask)
        return self.linear(place + "down_proj", inner, mask)

    def memory(self, x, layer, mask):
        c, w = self.config, f"model.layers.{layer}.cms."
        held = range(len(c.cms_levels_per_layer[layer]))
        if c.cms_variant != "independent":
            for i in held:
                x = x + self.mlp(self.norm(x, f"{w}norms.{i}.weight"), f"{w}levels.{i}.", mask)
            return x
        normed = self.norm(x, w + "norms.0.weight")
        outputs = torch.stack([self.mlp(normed, f"{w}levels.{i}.", mask) for i in held])
        agg = w + "aggregation."
        if c.cms_aggregation == "sum":
            return x + outputs.sum(0)
        if c.cms_aggregation == "concat":
            return x + self.own[agg + "proj.weight"] @ outputs.flatten()
        if c.cms_aggregation == "weighted_sum":
            shares = self.own[agg + "scores"].softmax(0)
        elif c.cms_aggregation == "gated":
            shares = (self.own[agg + "gate.weight"] @ normed + self.own[agg + "gate.bias"]).softmax(0)
        else:
            query = self.own[agg + "query.weight"] @ normed
            shares = torch.stack([query @ (self.own[agg + "key.weight"] @ o) for o in outputs])
            shares = (shares / c.hidden_size**0.5).softmax(0)
        return x + sum(s * o for s, o in zip(shares, outputs, strict=True))

    def token(self, token, position, mask):
        x = self.own["model.embed_tokens.weight"][token]
        for layer in range(self.config.num_hidden_layers):
            normed = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
            memory = self.memories.get(layer)
            x = x + (memory.step(normed) if memory else self.attention(normed, layer, position))
            x = self.memory(x, layer, mask)
        return self.own["lm_head.weight"] @ self.norm(x, "model.norm.weight")

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
