/** What the page uses of it. Throws where the text is too long. */
export function generate(text: string): { size: number; get(x: number, y: number): boolean };
