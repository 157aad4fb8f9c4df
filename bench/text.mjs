// How figures look in the report.

const digits = (value) => (Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2);
export const number = (value) => value.toFixed(digits(value));

/** A figure, with the least and the greatest round. */
export const ranged = ({ value, min, max }) => `${number(value)} (${number(min)}..${number(max)})`;

/** A ratio, with its goal and whether it is met. */
export function judged(ratio) {
  const text = `${ratio.value.toFixed(2)} (${ratio.min.toFixed(2)}..${ratio.max.toFixed(2)})`;
  if (ratio.atLeast !== undefined) return `${text}; goal ≥ ${ratio.atLeast}: ${isMet(ratio) ? 'met' : '**missed**'}`;
  if (ratio.atMost !== undefined) return `${text}; goal ≤ ${ratio.atMost}: ${isMet(ratio) ? 'met' : '**missed**'}`;
  return text;
}

export function isMet({ value, atLeast = -Infinity, atMost = Infinity }) {
  return value >= atLeast && value <= atMost;
}

export function table(columns, rows) {
  const lines = [columns, columns.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`);
  return `${lines.join('\n')}\n`;
}

/** Every ratio with a goal in a result, however deeply nested. */
export function goalsIn(value) {
  if (typeof value !== 'object' || value === null) return [];
  if ('atLeast' in value || 'atMost' in value) return [value];
  return Object.values(value).flatMap(goalsIn);
}

export const percent = (share) => `${Math.round(100 * share)} %`;
