"""Pure, jitted training steps and their losses."""
