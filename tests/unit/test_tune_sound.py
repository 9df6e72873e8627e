"""Tunes as sound: notes at their times, waveforms at their pitches."""

from __future__ import annotations

import numpy as np

from lcsc.music.files import midi_bytes
from lcsc.music.sound import RATE, notes_of, waveform


def test_notes_are_those_of_the_tune():
    notes = notes_of(midi_bytes("M:6/8\nL:1/8\nK:D\n|:d2f A3:|\n"))
    assert notes[:, 2].tolist() == [74, 78, 69] * 2  # D, F sharp by the key, A; played twice
    eighth = notes[-1, 0] - notes[-2, 0]
    np.testing.assert_allclose(np.diff(notes[:, 0]), np.array([2, 1, 3, 2, 1]) * eighth, atol=2e-3)


def test_a_waveform_has_the_pitch_at_the_time():
    wave = waveform(np.array([[0.5, 1.0, 69, 100], [2.0, 0.5, 81, 100]]))
    assert wave.dtype == np.float32
    assert abs(len(wave) / RATE - 2.51) < 1e-3
    assert abs(np.abs(wave).max() - 0.9) < 1e-6
    assert not wave[: int(0.49 * RATE)].any()
    for start, hertz in ((0.6, 440.0), (2.05, 880.0)):
        part = wave[int(start * RATE) : int((start + 0.4) * RATE)]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
        assert abs(np.fft.rfftfreq(len(part), 1 / RATE)[spectrum.argmax()] - hertz) < 3
    assert not waveform(np.zeros((0, 4))).any()
    high = waveform(np.array([[0.0, 0.2, 127, 100]]))  # 12.5 kHz is above half the rate
    assert not high.any()
