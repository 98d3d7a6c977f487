"""Text games whose rules a player must learn from experience: one file per game, and what all games share.

To add a game, write a class with the methods of ``game.Game`` and add one line to GAMES.
"""

from ctxjax.games.frozen_lake import FrozenLake
from ctxjax.games.grid_walk import GridWalk
from ctxjax.games.ice_slide import IceSlide
from ctxjax.games.sokoban import Sokoban

GAMES = {"frozenlake": FrozenLake, "sokoban": Sokoban, "ice_slide": IceSlide, "grid_walk": GridWalk}
