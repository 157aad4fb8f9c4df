// The plot of `growth`: how much longer a cancel takes when something has grown, by the factor of its growth.

const WIDTH = 780;
const HEIGHT = 400;
const LEFT = 60;
const RIGHT = 230;
const TOP = 30;
const BOTTOM = 50;
const COLOURS = ['#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#8c564b'];

/** Plots each curve of the result: its name and its points (`factor`: of the growth, `ratio`: of the latency). */
export function plotGrowth({ curves, goal }) {
  const points = curves.flatMap((curve) => curve.points);
  const most = Math.max(...points.map(({ factor }) => factor));
  const top = Math.max(2, ...points.map(({ ratio }) => ratio.max));
  const x = (factor) => LEFT + (Math.log10(factor) / Math.log10(most)) * (WIDTH - LEFT - RIGHT);
  const y = (ratio) => HEIGHT - BOTTOM - (ratio / top) * (HEIGHT - TOP - BOTTOM);
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="sans-serif" font-size="12">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="white"/>`,
    ...axes({ x, y, most, top }),
    line(LEFT, y(goal), WIDTH - RIGHT, y(goal), 'stroke="#888" stroke-dasharray="5 4"'),
    text(WIDTH - RIGHT + 6, y(goal) + 4, `goal: ${goal}`, 'fill="#666"'),
    ...curves.flatMap((curve, index) => drawCurve(curve, COLOURS[index % COLOURS.length], { x, y, index })),
    '</svg>',
  ];
  return `${parts.join('\n')}\n`;
}

function axes({ x, y, most, top }) {
  const parts = [
    line(LEFT, TOP, LEFT, y(0), 'stroke="black"'),
    line(LEFT, y(0), WIDTH - RIGHT, y(0), 'stroke="black"'),
  ];
  for (let factor = 1; factor <= most; factor *= 10)
    parts.push(text(x(factor), y(0) + 18, `${factor}×`, 'text-anchor="middle"'));
  for (let ratio = 0; ratio <= top; ratio += 0.5)
    parts.push(text(LEFT - 8, y(ratio) + 4, ratio.toFixed(1), 'text-anchor="end"'));
  parts.push(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, 'times as large as the base', 'text-anchor="middle"'));
  parts.push(text(LEFT - 40, TOP - 12, 'median latency of a cancel, over that of the base'));
  return parts;
}

function drawCurve({ name, points }, colour, { x, y, index }) {
  const path = points.map(({ factor, ratio }) => `${x(factor).toFixed(1)},${y(ratio.value).toFixed(1)}`).join(' ');
  return [
    `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="2"/>`,
    ...points.flatMap(({ factor, ratio }) => [
      `<circle cx="${x(factor).toFixed(1)}" cy="${y(ratio.value).toFixed(1)}" r="3.5" fill="${colour}"/>`,
      line(x(factor), y(ratio.min), x(factor), y(ratio.max), `stroke="${colour}" stroke-opacity="0.5"`),
    ]),
    text(WIDTH - RIGHT + 6, TOP + 10 + 18 * index, name, `fill="${colour}"`),
  ];
}

function line(x1, y1, x2, y2, style) {
  return `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" ${style}/>`;
}

function text(x, y, words, style = '') {
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${style}>${words}</text>`;
}
