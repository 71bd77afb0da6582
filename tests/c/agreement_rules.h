/*
 * agreement_rules.h: what must hold of every agreement, whatever befell it.
 */
#ifndef AGREEMENT_RULES_H
#define AGREEMENT_RULES_H

#include "agreement_world.h"

/* The first rule that was broken, as text; NULL: none.
 *   - every rank that lives and is not stuck is told an end, once, and before its deadline;
 *   - nobody publishes what is not durable everywhere, nor behind its end;
 *   - nobody is told "committed" or "aborted" when it is not so: no two ranks hold different
 *     certain outcomes, and no rank removes files of what is committed;
 *   - who is told of failures is told of at least one. */
const char *agreement_broken_rule(const struct world *world);

/* Over all ranks that are not dead or stuck. */
bool agreement_all_told(const struct world *world, int rc);
bool agreement_names(const struct world_result *rank, uint32_t failed_rank);
/* Writes the world to stderr: for a failed check. */
void agreement_describe(const struct world *world, const char *what);

#endif
