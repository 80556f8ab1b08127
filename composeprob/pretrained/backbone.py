"""Ideal backbones of proteins, built from internal coordinates."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

# Lengths in ångström, angles in degrees (Engh and Huber 1991, *Accurate bond and angle
# parameters for X-ray protein structure refinement*).
N_CA = 1.458
CA_C = 1.525
C_N = 1.329
C_O = 1.231
ANGLE_CA = 111.0
ANGLE_C = 116.6
ANGLE_N = 121.7
ANGLE_O = 120.1

HELIX = (-57.0, -47.0)
"""Torsions φ and ψ of an α helix, in degrees."""
STRAND = (-120.0, 130.0)
"""Torsion angles of a β strand."""
POLYPROLINE = (-75.0, 145.0)
"""Torsion angles of a polyproline II helix."""

Atom = Float[np.ndarray, " 3"]


def placed(
    a: Atom, b: Atom, c: Atom, length: float, angle: float, torsion: float
) -> Atom:
    """Return the atom at a distance from c, at an angle b-c-atom and a torsion
    a-b-c-atom."""
    angle = np.radians(angle)
    torsion = np.radians(torsion)
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal = normal / np.linalg.norm(normal)
    across = np.cross(normal, along)
    sideways = np.cos(torsion) * across + np.sin(torsion) * normal
    atom: Atom = c + length * (np.sin(angle) * sideways - np.cos(angle) * along)
    return atom


def ideal(
    torsions: tuple[float, float], length: int
) -> Float[np.ndarray, "length 4 3"]:
    """Return the atoms N, CA, C and O of a backbone whose residues all have the same
    torsions.

    Args:
        torsions: φ and ψ, in degrees.
        length: the number of residues.

    Returns:
        Their places, in ångström.

    Example:
        >>> from composeprob.pretrained.backbone import HELIX, ideal
        >>> ideal(HELIX, 12).shape
        (12, 4, 3)
    """
    phi, psi = torsions
    turn = np.radians(ANGLE_CA)
    n = np.zeros(3)
    ca = np.array([N_CA, 0.0, 0.0])
    c = ca + CA_C * np.array([-np.cos(turn), np.sin(turn), 0.0])
    residues = []
    for _ in range(length):
        oxygen = placed(n, ca, c, C_O, ANGLE_O, psi + 180.0)
        residues.append([n, ca, c, oxygen])
        next_n = placed(n, ca, c, C_N, ANGLE_C, psi)
        next_ca = placed(ca, c, next_n, N_CA, ANGLE_N, 180.0)
        next_c = placed(c, next_n, next_ca, CA_C, ANGLE_CA, phi)
        n = next_n
        ca = next_ca
        c = next_c
    return np.array(residues)
