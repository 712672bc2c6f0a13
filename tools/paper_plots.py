"""The plots of paper_table.py: channel norms before and after K-sort, and the divergence each layer causes alone."""

from pathlib import Path

import numpy as np

from ksort_gguf.errors import KsortError

_LARGEST_LOG2 = 2  # norms are coloured from 1/4 to 4 times their head's root mean square
_MOST_LAYER_LABELS = 16


def prepare(folder: str) -> Path:
    """The folder for plots, made if it does not exist. Raises KsortError if it cannot be, or without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise KsortError("--plot needs matplotlib: pip install '.[tools]'") from None
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KsortError(f"--plot {folder}: cannot be made: {error.strerror}") from None
    return path


def draw_channel_norms(norms: np.ndarray, order: np.ndarray, block_size: int, path: Path) -> None:
    """A heat map of every key head's channels, in stock order and sorted, as PNG.

    norms: [n_layers, n_kv_heads, head_dim], of Wk's rows in stock order; order: the plan's, of the same shape. A row of
    the picture is a head; lines part blocks of `block_size` channels.
    """
    from matplotlib.figure import Figure

    n_layers, n_kv_heads, head_dim = norms.shape
    figure = Figure(figsize=(11, np.clip(0.09 * n_layers * n_kv_heads, 4, 16)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, values in (
        (panels[0], "stock order", norms),
        (panels[1], "K-sorted", np.take_along_axis(norms, order, axis=2)),
    ):
        image = axes.imshow(
            _log2_to_head(values).reshape(-1, head_dim),
            aspect="auto",
            interpolation="nearest",
            vmin=-_LARGEST_LOG2,
            vmax=_LARGEST_LOG2,
        )
        for start in range(block_size, head_dim, block_size):
            axes.axvline(start - 0.5, color="white", linewidth=1)
        axes.set(title=title, xlabel="channel of the head")
    labelled = range(0, n_layers, -(-n_layers // _MOST_LAYER_LABELS))
    panels[0].set_yticks([layer * n_kv_heads for layer in labelled], labels=map(str, labelled))
    panels[0].set_ylabel(f"layer ({n_kv_heads} key heads each)")
    ticks = range(-_LARGEST_LOG2, _LARGEST_LOG2 + 1)
    bar = figure.colorbar(image, ax=panels, extend="both", ticks=ticks)
    bar.ax.set_yticklabels([f"{2**tick}" if tick >= 0 else f"1/{2**-tick}" for tick in ticks])
    bar.set_label("norm of Wk's row / root mean square of its head's")
    figure.savefig(path, dpi=120)


def _log2_to_head(norms: np.ndarray) -> np.ndarray:
    """log2 of norms [..., head_dim] over their head's root mean square; the darkest colour for norms of 0."""
    tiny = np.finfo(float).tiny
    rms = np.sqrt(np.mean(norms**2, axis=-1, keepdims=True))
    return np.log2(np.maximum(norms, tiny) / np.maximum(rms, tiny))


def draw_kld_by_layer(unsorted: list[float], k_sorted: list[float], block_size: int, path: Path) -> None:
    """Mean KLD to f16 keys when one layer alone has BFP12 keys, by layer, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for label, klds, marker in (("stock order", unsorted, "o"), ("K-sorted", k_sorted, "s")):
        axes.plot(klds, label=label, marker=marker, markersize=4)
    axes.set(
        yscale="log",
        xlabel="layer with BFP12 keys, all others f16",
        ylabel="mean KLD to f16 keys",
        title=f"What each layer's keys cost alone (blocks of {block_size})",
    )
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
