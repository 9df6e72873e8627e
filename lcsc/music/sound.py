"""A tune as sound: the notes of a MIDI file, and a waveform of them by adding harmonics. N = notes, S = samples."""

from __future__ import annotations

import numpy as np

from lcsc.core.errors import not_installed

#: Samples a second, enough for eight harmonics of the highest notes of a fiddle.
RATE = 22050
#: Loudness of the harmonics of a plucked string, the first one first.
HARMONICS = (1.0, 0.5, 0.33, 0.2, 0.12, 0.08, 0.05, 0.03)
#: Seconds in which a note rises, and falls when it ends; without them it clicks.
EDGE = 0.01
#: A note falls to 1/e in so many seconds.
DECAY = 0.6


def notes_of(midi: bytes) -> np.ndarray:
    """Start and length in seconds, MIDI pitch and velocity of each note in order, float64 (N, 4).

    Args:
        midi: a MIDI file, as `lcsc.music.files.midi_bytes` gives it.

    Raises:
        MissingExtraError: symusic is not installed.
    """
    try:
        from symusic import Score
    except ImportError as error:
        raise not_installed("Reading MIDI", "symusic", "music") from error
    tracks = Score.from_midi(midi).to("second").tracks
    rows = [(note.time, note.duration, note.pitch, note.velocity) for track in tracks for note in track.notes]
    return np.array(sorted(rows), dtype=np.float64).reshape(-1, 4)


def waveform(notes_N4: np.ndarray, rate: int = RATE) -> np.ndarray:
    """Additive synthesis: each note is a sum of harmonics that die away; float32 (S,), at most 0.9 loud.

    A pitch p has the frequency 440 x 2^((p - 69) / 12) Hz; harmonics above half the rate are left out.

    Args:
        notes_N4: see `notes_of`.
        rate: samples a second.
    """
    ends = notes_N4[:, 0] + notes_N4[:, 1]
    out_S = np.zeros(int(np.ceil((ends.max(initial=0.0) + EDGE) * rate)) + 1)
    for start, length, pitch, velocity in notes_N4:
        seconds = np.arange(int((length + EDGE) * rate)) / rate
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        tone = np.zeros(len(seconds))
        for number, loudness in enumerate(HARMONICS, 1):
            if number * hertz < rate / 2:
                tone += loudness * np.sin(2 * np.pi * number * hertz * seconds)
        shape = (
            np.exp(-seconds / DECAY) * np.clip(seconds / EDGE, 0, 1) * np.clip((length + EDGE - seconds) / EDGE, 0, 1)
        )
        at = int(start * rate)
        out_S[at : at + len(tone)] += velocity / 127 * tone * shape
    return (0.9 * out_S / max(np.abs(out_S).max(), 1e-9)).astype(np.float32)  # type: ignore[no-any-return]
