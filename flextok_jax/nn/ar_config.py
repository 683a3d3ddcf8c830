"""The configuration of a model that generates tokens."""

import dataclasses
import math

from flextok_jax.nn.config import Blocks, at_least, check, choices


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """A decoder-only Transformer over ordered tokens: by class, by text, or without condition.

    Attributes:
        vocab_size: V, number of token ids.
        num_tokens: L, number of positions.
        width, depth, head_dim, norm, norm_eps, mlp: see `Blocks`; norm is "rms" or "affine".
        mlp_hidden: hidden width of the MLPs.
        num_classes: number of class embeddings, 0: not conditioned on a class.
        text_dim: E, channels of the text embeddings that blocks attend to, 0: no text.
        text_hidden: hidden width of the two layers from E to D, 0 without text.
        text_gelu_tanh: whether their GELU is the tanh approximation.
        qk_norm: whether queries and keys are normalised per head, by RMSNorm.
        guidance_scale: the default of generation.
        group: tokens that are predicted at once, independently of each other given all before
            them; it divides L. 0: as many as there are (1, 1, 2, 4, ..., L / 2), one step for each
            doubling; L is a power of two.
        folded: whether the tokens of a group are one position of the blocks (see nn/fold.py), which
            then compute L / group of them; needs group > 1 that divides the width.
        masked: whether each position reads its own token or the start vector in its place, and all
            attend to all (see nn/masked.py); else each reads tokens before it.
        levels: of the FSQ whose ids are predicted in two steps; () else.
        coarse: for each of these levels, how many neighbouring values are one in a coarse id.
            Coarse ids are predicted as any, then all ids at once from all coarse ones, by as many
            blocks of their own (see nn/refiner.py).
        channels: F of continuous tokens, which a flow generates all at once (nn/token_flow.py):
            by class from noise, by text from the text; 0: tokens are ids.
        scale: what tokens are divided by in a flow, their standard deviation.
    """

    vocab_size: int = 64000
    num_tokens: int = 256
    width: int = 768
    depth: int = 12
    head_dim: int = 64
    mlp_hidden: int = 2048
    num_classes: int = 0
    text_dim: int = 0
    text_hidden: int = 0
    text_gelu_tanh: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-6
    guidance_scale: float = 1.5
    norm: str = "rms"
    mlp: str = "swiglu"
    group: int = 1
    masked: bool = False
    folded: bool = False
    levels: tuple[int, ...] = ()
    coarse: tuple[int, ...] = ()
    channels: int = 0
    scale: float = 1.0

    def __post_init__(self):
        faults = at_least(self, 1, "num_tokens", "depth", "mlp_hidden")
        faults += at_least(
            self, 0, "num_classes", "text_dim", "text_hidden", "group", "vocab_size", "channels"
        )
        plain = (self.group, self.masked, self.folded, self.coarse) == (1, False, False, ())
        if (self.channels > 0) == (self.vocab_size > 0) or (self.channels and not plain):
            faults.append(
                f"vocab_size={self.vocab_size}, channels={self.channels}: one of them must be 0; "
                "with channels group, masked, folded and coarse mean nothing"
            )
        if not 0 < self.scale < math.inf:
            faults.append(f"scale={self.scale}, must be positive and finite")
        faults += choices(self, norm=("rms", "affine"))
        if self.num_classes and self.text_dim:
            faults.append(
                f"num_classes={self.num_classes} and text_dim={self.text_dim}: a model is "
                "conditioned on a class or on text; set one of them to 0"
            )
        if (self.text_dim > 0) != (self.text_hidden > 0):
            faults.append(
                f"text_dim={self.text_dim} and text_hidden={self.text_hidden}: both must be "
                "positive (a text model) or both 0"
            )
        if not math.isfinite(self.guidance_scale):
            faults.append(f"guidance_scale={self.guidance_scale}, must be finite")
        if not faults and sum(size * count for _, size, count in self.runs) != self.num_tokens:
            wanted = f"a multiple of {self.group}" if self.group else "a power of two"
            faults.append(
                f"num_tokens={self.num_tokens} and group={self.group}: num_tokens must be {wanted}"
            )
        if self.masked and self.group != 1:
            faults.append(f"masked=True and group={self.group}: a masked model has no groups")
        if self.folded and (self.group < 2 or self.width % self.group):
            faults.append(
                f"folded=True, group={self.group} and width={self.width}: group must be 2 or more "
                "and divide the width"
            )
        if self.coarse and (self.masked or math.prod(self.levels) != self.vocab_size):
            faults.append(
                f"coarse={self.coarse}, levels={self.levels}, masked={self.masked}: the product of "
                f"the levels must be vocab_size={self.vocab_size}, and masked False"
            )
        if len(self.levels) != len(self.coarse) or min(self.coarse, default=1) < 1:
            faults.append(
                f"coarse={self.coarse}, must have a positive number for each of {self.levels}"
            )
        check(self, faults)
        _ = self.blocks  # checks the rest

    @property
    def blocks(self) -> Blocks:
        """The Transformer's blocks."""
        return Blocks(
            self.width,
            self.depth,
            self.head_dim,
            self.mlp_hidden,
            self.norm,
            self.norm_eps,
            "rms" if self.qk_norm else "none",
            self.mlp,
        )

    @property
    def num_ids(self) -> int:
        """How many ids are predicted in order: V, or the number of coarse ids."""
        if not self.coarse:
            return self.vocab_size
        return math.prod(-(-n // size) for n, size in zip(self.levels, self.coarse))

    @property
    def refiner(self) -> "ARConfig":
        """Of a model with coarse ids: the one that reads all of them."""
        changes = dict(levels=(), coarse=(), vocab_size=self.num_ids, masked=True)
        return dataclasses.replace(self, **changes, group=1, folded=False)

    @property
    def source(self) -> "ARConfig":
        """Of a flow from text: what makes its beginning, by half as many blocks."""
        changes = dict(channels=0, vocab_size=2 * self.channels, masked=True)
        return dataclasses.replace(self, **changes, depth=max(1, self.depth // 2))

    @property
    def whole(self) -> bool:
        """Whether tokens depend on later ones too: some of them cost as much as all."""
        return self.masked or bool(self.coarse or self.channels)

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Groups of one size in a row: (their first position, their size, how many they are)."""
        if self.group:
            return ((0, self.group, self.num_tokens // self.group),)
        doublings = range(self.num_tokens.bit_length() - 1)
        return ((0, 1, 1), *((1 << n, 1 << n, 1) for n in doublings))

    @property
    def folds(self) -> int:
        """How many tokens one position of the blocks stands for."""
        return self.group if self.folded else 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each position the first one of its group: who attends to whom, see nn/order.py."""
        if self.masked:
            return (0,) * self.num_tokens
        groups = ((a + i * size, size) for a, size, count in self.runs for i in range(count))
        return tuple(first for first, size in groups for _ in range(size))

    @property
    def num_heads(self) -> int:
        """H."""
        return self.width // self.head_dim

    @property
    def conditional(self) -> bool:
        """Whether there is a condition, and so something to guide."""
        return bool(self.num_classes or self.text_dim)
