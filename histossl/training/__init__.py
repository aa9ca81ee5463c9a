"""How training runs. Knows no method and no slide: the loop, the stage `pretrain`, the plan before it."""
