"""The size of a clip's latents, which every VAE computes in the same way from its compression."""


def latent_shape(
    channels: int, time: int, space: int, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """(c, t, h, w) of the latents of a clip.

    Args:
        channels: of the latents.
        time: frames per latent frame, after the first.
        space: pixels per latent position, along height and along width.
        num_frames: of the clip; likewise height and width in pixels.
    Raises:
        ValueError: if the clip's size does not fit; names the nearest that does.
    """
    if num_frames < 1 or (num_frames - 1) % time:
        nearest = max(round((num_frames - 1) / time), 0) * time + 1
        raise ValueError(f"num_frames {num_frames} is not {time}k+1: the nearest is {nearest}")
    for name, value in (("height", height), ("width", width)):
        if value < space or value % space:
            nearest = max(round(value / space), 1) * space
            raise ValueError(f"{name} {value} is not a multiple of {space}: the nearest is {nearest}")
    return channels, (num_frames - 1) // time + 1, height // space, width // space
