"""Recipes: experiments of the papers behind this package, in pieces that can be stopped and resumed. No Ray."""

from __future__ import annotations

from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.recipes import fashion, fig1, fig2, fig3, fig4, toy
from tune_hypergrad.recipes.recipe import Recipe, reproduce

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (fig1.RECIPE, fig2.RECIPE, fig3.RECIPE, fig4.RECIPE, toy.RECIPE, fashion.RECIPE)
}
"""All recipes by name."""

__all__ = ["RECIPES", "Recipe", "find", "reproduce"]


def find(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        InputError: there is none.
    """
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise InputError(f"there is no recipe {name!r}: choose one of {known}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]
