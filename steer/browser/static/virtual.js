// A list of any length of which only the rows in view exist.
//
// Browsers clamp heights at about 33 million pixels, so a longer list is scrolled on a shorter scale: a small movement is
// taken as it is, a large one, of the scrollbar, as a share of the whole; at rest the scrollbar is put where it belongs.

import { Component } from "./vendor/preact.js";
import { html } from "./ui.js";

export const MOST_PX = 16_000_000;
const SPARE = 6;
const REST_MS = 150;
const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(high, low));

// Pixels: of the whole list, of the element that scrolls through it, and the last position of either.
export function geometry(total, row, view, most = MOST_PX) {
  const whole = total * row;
  const height = Math.min(whole, most);
  return { whole, height, deepest: Math.max(whole - view, 0), furthest: Math.max(height - view, 0), view };
}

// Where the view is in the whole list, after the scrollbar moved from where it was at `before`.
export function follow(before, scroll, { whole, height, deepest, furthest, view }) {
  if (whole === height) return { top: clamp(scroll, 0, deepest), scroll };
  const moved = scroll - before.scroll;
  if (scroll <= 0) return { top: 0, scroll };
  if (scroll >= furthest) return { top: deepest, scroll };
  if (Math.abs(moved) < 4 * view) return { top: clamp(before.top + moved, 0, deepest), scroll };
  return { top: (scroll / furthest) * deepest, scroll };
}

export const scrollOf = (top, { whole, height, deepest, furthest }) => (whole === height || deepest === 0 ? top : (top / deepest) * furthest);

// The least movement that brings a row into view.
export const reveal = (top, index, row, view) => clamp(top, (index + 1) * row - view, index * row);

// Props: total, row (pixels), head (a row above all), draw(i), onRange(first, end), and whatever the element is to have.
// `show(i)` of an instance brings a row into view.
export class VirtualList extends Component {
  spot = { top: 0, scroll: 0 };
  view = 600;

  componentDidMount() {
    this.watcher = new ResizeObserver(() => this.measure() && this.setState({}));
    this.watcher.observe(this.element);
    this.measure();
    if (this.props.at !== undefined) this.show(this.props.at, true);
    this.tell();
    this.setState({});
  }

  componentWillUnmount() {
    this.watcher.disconnect();
    clearTimeout(this.resting);
  }

  componentDidUpdate() { this.tell(); }

  // Height for rows: without the head, which is as high as one. Whether it has changed.
  measure() {
    const before = this.view;
    this.view = Math.max(this.element.clientHeight - this.props.row, this.props.row);
    return this.view !== before;
  }

  geometry() { return geometry(this.props.total, this.props.row, this.view, this.props.most); }

  // Scrolls to a place of the whole list at once, so that the next frame is right.
  place(top) {
    const shape = this.geometry();
    const aim = clamp(top, 0, shape.deepest);
    this.element.scrollTop = scrollOf(aim, shape);
    this.spot = { top: aim, scroll: this.element.scrollTop };
    this.setState({});
  }

  show(index, isCentred = false) {
    const { row } = this.props;
    const aim = isCentred ? index * row - (this.view - row) / 2 : reveal(this.spot.top, index, row, this.view);
    if (aim !== this.spot.top) this.place(aim);
  }

  scrolled = () => {
    const { scrollTop } = this.element;
    if (Math.abs(scrollTop - this.spot.scroll) < 1) return;
    this.spot = follow(this.spot, scrollTop, this.geometry());
    this.setState({});
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.rest(), REST_MS);
  };

  rest() {
    const shape = this.geometry();
    if (shape.whole !== shape.height) this.place(this.spot.top);
  }

  // First row to draw, and the one behind the last.
  range() {
    const { total, row } = this.props;
    const { top } = this.spot;
    return [Math.max(Math.floor(top / row) - SPARE, 0), Math.min(Math.ceil((top + this.view) / row) + SPARE, total)];
  }

  tell() {
    const [first, end] = this.range();
    if (first === this.first && end === this.end && this.told === this.props.onRange) return;
    [this.first, this.end, this.told] = [first, end, this.props.onRange];
    this.props.onRange(first, end);
  }

  render({ total, row, head, draw, onRange, most, at, ...given }) {
    const [first, end] = this.range();
    const { top, scroll } = this.spot;
    const numbers = Array.from({ length: Math.max(end - first, 0) }, (_, i) => first + i);
    return html`<div ...${given} ref=${(element) => { this.element = element ?? this.element; }} onScroll=${this.scrolled}>
      ${head}
      <div class="rows" role="presentation" style=${{ height: `${this.geometry().height}px` }}>
        <div role="presentation" style=${{ transform: `translateY(${Math.round(scroll + first * row - top)}px)` }}>${numbers.map(draw)}</div>
      </div>
    </div>`;
  }
}
